"""The synthetic data set as a folder: configuration, files, cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from pssl.core.cache import cache_dir
from pssl.core.errors import InputError
from pssl.core.files import folder_in_the_making

from .. import palette
from ..palette import label_image
from ..voc import IGNORE
from . import creatures, picture, scenery
from .creatures import CLASSES
from .picture import SyntheticImage, draw_image

__all__ = ["SyntheticConfig", "border_of", "ensure_synthetic", "generator_version", "write_synthetic"]

RECORD = "synthetic.json"  # written last: what made the folder
JPEG_QUALITY = 92  # about that of VOC's photographs, which came from Flickr
SMALLEST_SIZE = 32  # below, a part has fewer pixels than a feature cell
FIRST_ID = {
    "train": 1,
    "val": 500_001,
}  # far apart, so that image i of a split never depends on the other's length


@dataclass(frozen=True)
class SyntheticConfig:
    """What to write. Same configuration, same bytes (given the same numpy and Pillow)."""

    variant: Literal["parts", "uniform"] = "parts"
    """"parts": the class is told by a small part; "uniform": by the whole object (the control)."""
    train: int = 600
    """Images of the split "train"."""
    val: int = 200
    """Images of the split "val", held out."""
    size: int = 96
    """Height and width of every image, in pixels."""
    seed: int = 0
    """Seed of all randomness; image i of a split depends on variant, size, seed and i only."""

    def __post_init__(self) -> None:
        if self.variant not in ("parts", "uniform"):
            raise InputError(f"synthetic: variant must be 'parts' or 'uniform', got {self.variant!r}")
        for name, lowest, highest in (
            ("train", 1, 499_999),
            ("val", 1, 499_999),
            ("size", SMALLEST_SIZE, 4096),
        ):
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise InputError(f"synthetic: {name} must be in {lowest}..{highest}, got {value}")
        if self.seed < 0:
            raise InputError(f"synthetic: seed must be 0 or more, got {self.seed}")


def generator_version() -> str:
    """A short hash of the code that draws and writes, so that a cached set of other code is never taken."""
    digest = hashlib.sha256()
    for path in (creatures.__file__, scenery.__file__, picture.__file__, palette.__file__, __file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


def write_synthetic(root: str | Path, config: SyntheticConfig = SyntheticConfig()) -> Path:
    """Write the data set to the new folder `root`, and return it.

    Everything is first written to a temporary folder beside `root`, then renamed: `root` is complete or not
    there. The default set takes under 20 s on one core and 8 MB. Raises FileExistsError where `root` exists
    and is not an empty folder.
    """
    root = Path(root)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FileExistsError(
            f"{root}: expected a new or empty folder for the synthetic set, got one with content"
        )
    with folder_in_the_making(root) as temporary:
        _write_folder(temporary, config)
    return root


def ensure_synthetic(
    root: str | Path | None = None,
    config: SyntheticConfig = SyntheticConfig(),
) -> Path:
    """The data set's folder, written if it is not there yet. Safe with several processes at once.

    `root` defaults to ``cache_dir()/synthetic-<variant>-<hash of configuration and code>``. A folder that is
    there is taken if it was made by the same configuration and code; otherwise ValueError says what differs.
    """
    record = _record(config)
    if root is None:
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        root = cache_dir() / f"synthetic-{config.variant}-{key}"
    root = Path(root)
    if not (root / RECORD).is_file():
        try:
            return write_synthetic(root, config)
        except OSError:
            if not (root / RECORD).is_file():  # else another process was faster
                raise
    found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    differing = [key for key in record if not isinstance(found, dict) or found.get(key) != record[key]]
    if differing:
        got = (
            ", ".join(f"{key} {found.get(key)!r}" for key in differing) if isinstance(found, dict) else found
        )
        expected = ", ".join(f"{key} {record[key]!r}" for key in differing)
        raise InputError(
            f"{root / RECORD}: expected a set with {expected}, got {got}; remove it or name another folder"
        )
    return root


def _record(config: SyntheticConfig) -> dict[str, object]:
    return {**asdict(config), "generator": generator_version()}


def border_of(instances: np.ndarray) -> np.ndarray:
    """bool [H,W]: pixels with another value beside, above or below: a border of 2 px, one on each side."""
    border = np.zeros(instances.shape, bool)
    for axis in (0, 1):
        ahead = np.diff(instances.astype(np.int16), axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, 1)
        border |= np.pad(ahead, pad)
        pad[axis] = (1, 0)
        border |= np.pad(ahead, pad)
    return border


def _write_folder(root: Path, config: SyntheticConfig) -> None:
    for name in (
        "JPEGImages",
        "SegmentationClass",
        "Annotations",
        "Parts",
        "ImageSets/Main",
        "ImageSets/Segmentation",
    ):
        (root / name).mkdir(parents=True)
    present: dict[str, dict[str, set[str]]] = {}
    for split, count in (("train", config.train), ("val", config.val)):
        present[split] = {}
        for number in range(FIRST_ID[split], FIRST_ID[split] + count):
            image_id = f"2012_{number:06d}"
            rng = np.random.default_rng([config.seed, number])
            drawn = draw_image(rng, config.size, uniform=config.variant == "uniform")
            present[split][image_id] = _write_image(root, image_id, drawn)
    present["trainval"] = present["train"] | present["val"]
    for split, images in present.items():
        plain = "".join(f"{image_id}\n" for image_id in images)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(plain, newline="\n")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(plain, newline="\n")
        for name in CLASSES:
            lines = "".join(
                f"{image_id} {1 if name in classes else -1:2d}\n" for image_id, classes in images.items()
            )
            (root / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text(lines, newline="\n")
    (root / RECORD).write_text(json.dumps(_record(config), indent=2) + "\n", newline="\n")


def _write_image(root: Path, image_id: str, drawn: SyntheticImage) -> set[str]:
    """Write one image's files; the classes in it."""
    border = border_of(drawn.instances)
    lookup = np.array([0] + [list(CLASSES).index(name) + 1 for name in drawn.classes], np.uint8)
    mask = np.where(border, IGNORE, lookup[drawn.instances]).astype(np.uint8)
    parts = np.where(border, IGNORE, drawn.parts).astype(np.uint8)
    Image.fromarray(drawn.image).save(root / "JPEGImages" / f"{image_id}.jpg", quality=JPEG_QUALITY)
    label_image(mask).save(root / "SegmentationClass" / f"{image_id}.png")
    label_image(parts).save(root / "Parts" / f"{image_id}.png")
    (root / "Annotations" / f"{image_id}.xml").write_text(_annotation(image_id, drawn), newline="\n")
    return set(drawn.classes)


def _annotation(image_id: str, drawn: SyntheticImage) -> str:
    """VOC's annotation XML. Objects too hidden to be told are not drawn, hence none is difficult."""
    height, width = drawn.instances.shape
    lines = [
        "<annotation>",
        "\t<folder>VOC2012</folder>",
        f"\t<filename>{escape(image_id)}.jpg</filename>",
        "\t<source>",
        "\t\t<database>pssl synthetic</database>",
        "\t\t<annotation>pssl synthetic</annotation>",
        "\t\t<image>procedural</image>",
        "\t</source>",
        "\t<size>",
        f"\t\t<width>{width}</width>",
        f"\t\t<height>{height}</height>",
        "\t\t<depth>3</depth>",
        "\t</size>",
        "\t<segmented>1</segmented>",
    ]
    for index, name in enumerate(drawn.classes):
        rows, columns = np.nonzero(drawn.instances == index + 1)
        box = {"xmin": columns.min(), "ymin": rows.min(), "xmax": columns.max(), "ymax": rows.max()}
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(name)}</name>",
            f"\t\t<pose>{drawn.facing[index]}</pose>",
            f"\t\t<truncated>{int(drawn.truncated[index])}</truncated>",
            f"\t\t<occluded>{int(drawn.occluded[index])}</occluded>",
            "\t\t<difficult>0</difficult>",
            "\t\t<bndbox>",
            *(
                f"\t\t\t<{key}>{int(value) + 1}</{key}>" for key, value in box.items()
            ),  # VOC counts pixels from 1
            "\t\t</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])

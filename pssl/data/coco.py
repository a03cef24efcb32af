"""COCO 2014 as downloaded: ``annotations/instances_<split>.json`` beside the folders of images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pssl.core.errors import InputError

from .image_labels import check_id
from .label_files import labels_from_file
from .outlines import decode_run_lengths, fill_polygon, parse_run_lengths
from .pictures import load_image
from .voc import check_class_names, mask_like_image

__all__ = ["COCOFolder"]


@dataclass
class _Image:
    """One image of a split: its file's name, size and objects."""

    file: str
    height: int
    width: int
    objects: list[tuple[int, bool, float, Any]] = field(default_factory=list)
    """Class 1..K, whether a crowd, area, outline."""


class COCOFolder:
    """Images, masks and image-level labels of a COCO folder; a `DataFolder`, as `VOCFolder` is.

    Args:
        root: the folder that holds ``annotations``; images lie in ``<split>`` or ``images/<split>``.
        label_file: a file of image-level labels (`labels_from_file`); None: the classes of an image's objects.

    Splits are named as in the annotation files, ``train2014`` and ``val2014``. Classes are COCO's, in the order of
    their category numbers, so that regions are 1..80 without gaps. Images without any object are left out, as in the
    lists that everybody uses (82,081 and 40,137 images). Annotations are read when a split is first asked for; those of
    ``train2014`` take about a minute and 2 GB. Raises FileNotFoundError and ValueError, naming the file.
    """

    def __init__(self, root: str | Path, *, label_file: Path | None = None) -> None:
        self.root = Path(root)
        self._label_file = label_file
        files = sorted((self.root / "annotations").glob("instances_*.json"))
        if not files:
            raise FileNotFoundError(
                f"{self.root}: not in COCO's layout, missing annotations/instances_<split>.json"
            )
        self.splits: tuple[str, ...] = tuple(file.stem.removeprefix("instances_") for file in files)
        self._read: dict[str, dict[str, _Image]] = {}
        self._categories: dict[int, str] = {}

    @property
    def name(self) -> str:
        """The root's folder name, for reports."""
        return self.root.resolve().name

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, region 1 first."""
        # The smallest file names the same categories as the others.
        files = {split: self._annotations(split).stat().st_size for split in self.splits}
        self._split(min(files, key=files.__getitem__))
        return tuple(name for _, name in sorted(self._categories.items()))

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.classes)

    has_parts = False
    read_as = "COCO's layout"
    notes = ()

    def __repr__(self) -> str:
        return f"COCOFolder({str(self.root)!r}, splits {', '.join(self.splits)})"

    def ids(self, split: str) -> list[str]:
        """Image ids (file names without ending) of a split, in the order of the annotation file."""
        if split not in self.splits:
            raise InputError(f"{self.root}: no split {split!r}; annotations has {', '.join(self.splits)}")
        return [image_id for image_id, image in self._split(split).items() if image.objects]

    def image_path(self, image_id: str) -> Path:
        """The image's file, whether it exists or not."""
        split, image = self._find(image_id)
        inner = self.root / "images" / split
        return (inner if inner.is_dir() else self.root / split) / image.file

    def mask_path(self, image_id: str) -> None:
        """Return None: masks are drawn from the annotations."""
        return None

    def has_mask(self, image_id: str) -> bool:
        """Return whether all objects of the image have an outline; boxes and categories alone are image labels only."""
        return all(outline for *_, outline in self._find(image_id)[1].objects)

    def image(self, image_id: str) -> np.ndarray:
        """The image, uint8 [H,W,3] RGB. FileNotFoundError where missing, ValueError where damaged."""
        return load_image(self.image_path(image_id))

    def mask(self, image_id: str) -> np.ndarray:
        """Ground truth uint8 [H,W]: 0 background, 1..K.

        Objects are painted from the largest to the smallest, crowds first, so that what lies in front mostly shows:
        COCO does not say which of two overlapping objects does. ValueError for an outline that cannot be drawn.
        """
        split, image = self._find(image_id)
        mask = np.zeros((image.height, image.width), np.uint8)
        for region, _, _, outline in sorted(image.objects, key=lambda thing: (not thing[1], -thing[2])):
            try:
                mask[_draw(outline, image.height, image.width)] = region
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{self._annotations(split)}: image {image_id}: {error}") from None
        return mask_like_image(mask, self.image_path(image_id))

    def parts(self, image_id: str) -> None:
        """None: COCO says nothing about parts."""
        return None

    def image_labels(self, ids: Iterable[str]) -> np.ndarray:
        """Image-level labels uint8 [N,K], 1 where the class is in the image."""
        ids = list(ids)
        if self._label_file is not None:
            return labels_from_file(self._label_file, ids, self.classes)
        labels = np.zeros((len(ids), self.num_classes), np.uint8)
        for row, image_id in enumerate(ids):
            labels[row, [thing[0] - 1 for thing in self._find(image_id)[1].objects]] = 1
        return labels

    def _annotations(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"

    def _find(self, image_id: str) -> tuple[str, _Image]:
        # Splits that are read already first; file names carry their split's, so they do not repeat.
        for split in sorted(self.splits, key=lambda name: name not in self._read):
            images = self._split(split)
            if image_id in images:
                return split, images[image_id]
        raise FileNotFoundError(f"{self.root}: no annotation file names image {image_id!r}")

    def _split(self, split: str) -> dict[str, _Image]:
        if split not in self._read:
            path = self._annotations(split)
            try:
                # Outlines become small arrays while the file is read: as Python's lists they take ten times the room.
                content = json.loads(path.read_bytes(), object_hook=_compact)
                categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
                check_class_names(list(categories.values()), "categories")
                if self._categories and categories != self._categories:
                    raise InputError("its categories differ from another split's")
                self._categories = categories
                self._read[split] = _index(content, categories)
            except KeyError as error:
                raise InputError(f"{path}: expected COCO's instances, got an entry without {error}") from None
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}: expected COCO's instances, got: {error}") from None
        return self._read[split]


def _compact(entry: dict) -> dict:
    outline = entry.get("segmentation")
    if isinstance(outline, list):
        entry["segmentation"] = [np.asarray(polygon, np.float32) for polygon in outline]
    return entry


def _index(content: dict, categories: dict[int, str]) -> dict[str, _Image]:
    """Return the images of one annotation file by id."""
    region = {category: number for number, category in enumerate(sorted(categories), 1)}
    images: dict[Any, _Image] = {}
    for entry in content["images"]:
        file, number = str(entry["file_name"]), entry["id"]
        if number in images:
            raise InputError(f"images {images[number].file} and {file} share the id {number}")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise InputError(f"expected file names below the folder of images, got {file!r}")
        images[number] = _Image(file, int(entry["height"]), int(entry["width"]))
    for entry in content["annotations"]:
        for key, known in (("image_id", images), ("category_id", region)):
            if entry[key] not in known:
                raise InputError(f"an annotation whose {key} {entry[key]!r} nothing has")
        images[entry["image_id"]].objects.append(
            (
                region[entry["category_id"]],
                bool(entry.get("iscrowd")),
                float(entry.get("area") or 0),
                entry.get("segmentation"),
            )
        )
    return dict(zip(_ids_of([image.file for image in images.values()]), images.values(), strict=True))


def _ids_of(files: list[str]) -> list[str]:
    """Return an id for each file: its name without ending, or what more of its path tells it from the others."""
    ids = [Path(file).stem for file in files]
    for form in (lambda path: "__".join(path.with_suffix("").parts), lambda path: "__".join(path.parts)):
        shared = {image_id for image_id, count in Counter(ids).items() if count > 1}
        ids = [form(Path(file)) if i in shared else i for i, file in zip(ids, files, strict=True)]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice or len(set(ids)) < len(ids):
        raise InputError(f"several images are the file {(twice or files)[0]}")
    for image_id in ids:
        check_id(image_id, "file_name")
    return ids


def _draw(outline: Any, height: int, width: int) -> np.ndarray:
    """An annotation's mask, bool [height,width]: the union of its polygons, or its run lengths."""
    if isinstance(outline, list):
        mask = np.zeros((height, width), bool)
        for polygon in outline:
            mask |= fill_polygon(polygon, height, width)
        return mask
    if list(outline["size"]) != [height, width]:
        raise InputError(f"run lengths: expected size {[height, width]}, got {outline['size']}")
    counts = outline["counts"]
    return decode_run_lengths(parse_run_lengths(counts) if isinstance(counts, str) else counts, height, width)

"""A folder in PASCAL VOC 2012's layout."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pssl.core.errors import InputError

from .hashing import SPLITS, held_out_ids
from .image_labels import (
    LabelSource,
    ListedImage,
    annotation_objects,
    class_files,
    read_list,
    resolve_image_labels,
)
from .label_files import read_table_text
from .pictures import find_picture, is_hidden, load_image, open_picture, orientation, pictures_in, upright

__all__ = ["BODY", "IGNORE", "PART", "VOCFolder", "read_label_png"]

IGNORE = 255  # mask and part-map value of pixels that count for nothing
PART, BODY = 1, 2  # values of `VOCFolder.parts`
MAX_CLASSES = 254  # 0 is background, 255 is ignore
TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations that exchange width and height ask for."""


class VOCFolder:
    """Images, masks and image-level labels of a folder in VOC 2012's layout.

    Args:
        root: the folder that holds ``JPEGImages`` (``…/VOCdevkit/VOC2012`` of the original).
        label_source: where image-level labels come from, see `resolve_image_labels`; default "auto".
        masks: the folder of ground-truth masks, default VOC's ``SegmentationClass``; ``SegmentationClassAug``
            for SBD's.
        classes: a file of class names, one a line; default: found in the folder.

    Needed: ``JPEGImages`` and class names. Splits are the lists of ``ImageSets/Segmentation``, else the plain lists of
    ``ImageSets/Main``, else "train" and "val" drawn by a hash of the images' names (`held_out`). The names come
    from ``classes.txt`` in the root (one a line, line k is region k), else from
    ``ImageSets/Main/<class>_<split>.txt``, else from all of ``Annotations``, the latter two in alphabetical
    order, which for VOC is the order of its label indices. Raises FileNotFoundError, naming the folder and
    what is missing, and ValueError for names that cannot be used. Masks are needed only when `mask` is
    called.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        label_source: LabelSource = "auto",
        masks: str = "SegmentationClass",
        classes: Path | None = None,
        held_out: float = 0.2,
    ) -> None:
        self.root = Path(root)
        self.label_source = label_source
        self._masks = masks
        self._classes_file = classes
        self._listed: dict[str, ListedImage] = {}
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such data folder (expected one in VOC 2012's layout)")
        if not (self.root / "JPEGImages").is_dir():
            inner = self.root / "VOCdevkit" / "VOC2012"
            hint = f"; did you mean {inner}?" if inner.is_dir() else ""
            raise FileNotFoundError(f"{self.root}: not in VOC 2012's layout, missing JPEGImages{hint}")
        self._lists = self._find_lists()
        self._held_out = held_out
        self.splits: tuple[str, ...] = tuple(self._lists) or SPLITS
        self.classes: tuple[str, ...] = self._find_classes()

    @property
    def name(self) -> str:
        """The root's folder name, for reports."""
        return self.root.resolve().name

    notes = ()

    @property
    def read_as(self) -> str:
        """How the folder was read, for reports."""
        return "VOC's layout" + (
            "" if self._lists else f", no lists: {self._held_out:.0%} held out by a hash of names"
        )

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.classes)

    def __repr__(self) -> str:
        return f"VOCFolder({str(self.root)!r}, {self.num_classes} classes, splits {', '.join(self.splits)})"

    def _find_lists(self) -> dict[str, Path]:
        """Return the lists of images by split."""
        folder = self.root / "ImageSets"
        lists = {file.stem: file for file in sorted((folder / "Segmentation").glob("*.txt"))}
        if not lists:  # of Main's lists those of classes say something else
            of_classes = {file for files in class_files(self.root).values() for file in files}
            lists = {f.stem: f for f in sorted((folder / "Main").glob("*.txt")) if f not in of_classes}
        return {name: path for name, path in lists.items() if not is_hidden(path.name)}

    def _find_classes(self) -> tuple[str, ...]:
        listed = self._classes_file or self.root / "classes.txt"
        if self._classes_file is not None or listed.is_file():
            if not listed.is_file():
                raise FileNotFoundError(f"{listed}: no such file of class names")
            names = [line.strip() for line in read_table_text(listed).splitlines() if line.strip()]
            where = str(listed)
        else:
            names = sorted(class_files(self.root, self.splits))
            where = str(self.root / "ImageSets" / "Main")
            if not names:
                where = str(self.root / "Annotations")
                found: set[str] = set()
                for path in sorted((self.root / "Annotations").glob("*.xml")):
                    found.update(annotation_objects(path))
                names = sorted(found)
        if not names:
            raise FileNotFoundError(
                f"{self.root}: no class names: expected classes.txt, ImageSets/Main/<class>_<split>.txt or "
                f"Annotations/*.xml"
            )
        return check_class_names(names, where)

    def ids(self, split: str) -> list[str]:
        """Image ids of a split's list, or of a list file elsewhere, in the file's order; without lists, sorted.

        A `split` that ends in ".txt" is a file's path; its lines may name files (`read_list`), which `image` and `mask`
        then read. Raises ValueError for a split that the folder does not have, or a list that `read_list` refuses.
        """
        if split.endswith(".txt"):
            path = Path(split)
        elif split not in self.splits:
            raise InputError(
                f"{self.root}: no split {split!r}; expected one of {', '.join(self.splits)}; a list elsewhere is named "
                "by its path, which ends in .txt"
            )
        elif not self._lists:
            ids = sorted(path.stem for path in pictures_in(self.root / "JPEGImages"))
            held = held_out_ids(ids, self._held_out)
            return [image_id for image_id in ids if (image_id in held) == (split == "val")]
        else:
            path = self._lists[split]
        images = self.root / "JPEGImages"
        entries = read_list(path, lambda name: find_picture(images, name).is_file())
        self._listed.update({entry.id: entry for entry in entries if entry.image is not None})
        return [entry.id for entry in entries]

    def image_path(self, image_id: str) -> Path:
        """The image's file: what a list named, else the picture of that name in ``JPEGImages``, whatever its ending.

        Where there is none, ``JPEGImages/<id>.jpg``.
        """
        listed = self._listed.get(image_id)
        if listed and listed.image:
            return self.root / listed.image
        return find_picture(self.root / "JPEGImages", image_id)

    def mask_path(self, image_id: str) -> Path:
        """The ground-truth mask's file, whether it exists or not: what a list named, else that of the mask folder."""
        listed = self._listed.get(image_id)
        return self.root / (listed.mask if listed and listed.mask else f"{self._masks}/{image_id}.png")

    def image(self, image_id: str) -> np.ndarray:
        """The image, uint8 [H,W,3] RGB. FileNotFoundError where missing, ValueError where damaged."""
        return load_image(self.image_path(image_id))

    def mask(self, image_id: str) -> np.ndarray:
        """Ground truth uint8 [H,W]: 0 background, 1..K as in `classes`, 255 ignore.

        The palette indices of the PNG (or grey values, as SBD's masks have). Raises FileNotFoundError where
        missing; ValueError, naming the file, for a damaged file, one with colours, or a label above K.
        """
        mask = read_label_png(self.mask_path(image_id), self.num_classes)
        return mask_like_image(mask, self.image_path(image_id))

    def has_mask(self, image_id: str) -> bool:
        """Return whether the image's mask is there."""
        return self.mask_path(image_id).is_file()

    @cached_property
    def has_parts(self) -> bool:
        """Whether the folder has ``Parts``, as the synthetic set does."""
        return (self.root / "Parts").is_dir()

    def parts(self, image_id: str) -> np.ndarray | None:
        """uint8 [H,W]: 0 background, 1 discriminative part, 2 body, 255 border; None without ``Parts``.

        Raises as `mask` does.
        """
        if not self.has_parts:
            return None
        return read_label_png(self.root / "Parts" / f"{image_id}.png", BODY)

    def image_labels(self, ids: Iterable[str]) -> np.ndarray:
        """Image-level labels uint8 [N,K], 1 where the class is in the image, from `label_source`."""
        return resolve_image_labels(self.root, list(ids), self.classes, self.label_source)


def check_class_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return class names, region 1 first; InputError, naming the place, for names that cannot be used.

    None may stand there twice, differ from another by its case or by how its letters are composed alone, or mean the
    background, which is region 0 always. There are at most 254.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice or not 0 < len(names) <= MAX_CLASSES:
        got = f"{', '.join(twice)} more than once" if twice else len(names)
        raise InputError(f"{where}: expected 1 to {MAX_CLASSES} different class names, got {got}")
    folded: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold().strip()
        if plain.strip("_") == "background":
            raise InputError(
                f"{where}: expected classes without the background, which is region 0, got {name!r}"
            )
        if plain in folded:
            raise InputError(
                f"{where}: expected different classes, got {folded[plain]!r} and {name!r}, which differ by "
                "case or spelling of a letter only"
            )
        folded[plain] = name
    return tuple(names)


def mask_like_image(mask: np.ndarray, image_path: Path) -> np.ndarray:  # uint8 [H,W]
    """Return a mask as its picture is shown.

    Some tools draw masks on the stored pixels of a picture that its EXIF orientation turns by a quarter: such a mask
    has the stored size, and is turned as the picture is.
    """
    if not image_path.is_file():
        return mask
    with open_picture(image_path) as picture:
        if (
            orientation(picture) < 5
            or mask.shape != (picture.height, picture.width)
            or picture.width == picture.height
        ):
            return mask
        turn = TURNS[orientation(picture)]
    return np.asarray(Image.fromarray(mask).transpose(turn))


def server_folder(out: Path, split: str) -> Path:
    """Return the folder below `out` in which the VOC 2012 evaluation server looks for the label PNGs of a split."""
    return out / "results/VOC2012/Segmentation" / f"comp6_{Path(split).stem}_cls"


def read_label_png(path: Path, highest: int) -> np.ndarray:
    """A label image uint8 [H,W], values 0..`highest` and 255: a palette PNG's indices, or grey values.

    Raises FileNotFoundError where missing; ValueError, naming the file, for a damaged file, one with colours, or
    another label.
    """
    labels = _read_indices(path)
    counts = np.bincount(labels.ravel(), minlength=256)
    wrong = [int(label) for label in np.flatnonzero(counts[:IGNORE]) if label > highest]
    if wrong:
        raise InputError(
            f"{path}: expected labels 0..{highest} and {IGNORE}, got {wrong[:5]} "
            f"({int(counts[wrong].sum())} pixels)"
        )
    return labels


def _read_indices(path: Path) -> np.ndarray:
    with open_picture(path) as picture:
        if picture.mode not in ("P", "L"):
            raise InputError(f"{path}: expected a palette or 8-bit grey PNG, got mode {picture.mode}")
        try:
            return np.array(upright(picture))
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{path}: expected a whole label image, got one that cannot be decoded ({error})"
            ) from None

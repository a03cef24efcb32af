"""A folder in PASCAL VOC 2012's layout."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pssl.core.errors import InputError

from .image_labels import (
    LabelSource,
    ListedImage,
    annotation_objects,
    class_files,
    read_list,
    resolve_image_labels,
)

__all__ = ["BODY", "IGNORE", "PART", "VOCFolder", "load_image", "read_label_png"]

IGNORE = 255  # mask and part-map value of pixels that count for nothing
PART, BODY = 1, 2  # values of `VOCFolder.parts`
MAX_CLASSES = 254  # 0 is background, 255 is ignore


class VOCFolder:
    """Images, masks and image-level labels of a folder in VOC 2012's layout.

    Args:
        root: the folder that holds ``JPEGImages`` (``…/VOCdevkit/VOC2012`` of the original).
        label_source: where image-level labels come from, see `resolve_image_labels`; default "auto".
        masks: the folder of ground-truth masks, default VOC's ``SegmentationClass``; ``SegmentationClassAug``
            for SBD's.
        classes: a file of class names, one a line; default: found in the folder.

    Needed: ``JPEGImages``, ``ImageSets/Segmentation`` with at least one list, and class names. The names come
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
    ) -> None:
        self.root = Path(root)
        self.label_source = label_source
        self._masks = masks
        self._classes_file = classes
        self._listed: dict[str, ListedImage] = {}
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such data folder (expected one in VOC 2012's layout)")
        missing = [
            name for name in ("JPEGImages", "ImageSets/Segmentation") if not (self.root / name).is_dir()
        ]
        if missing:
            inner = self.root / "VOCdevkit" / "VOC2012"
            hint = f"; did you mean {inner}?" if inner.is_dir() else ""
            raise FileNotFoundError(
                f"{self.root}: not in VOC 2012's layout, missing {', '.join(missing)}{hint}"
            )
        self.splits: tuple[str, ...] = tuple(
            sorted(file.stem for file in (self.root / "ImageSets" / "Segmentation").glob("*.txt"))
        )
        if not self.splits:
            raise FileNotFoundError(f"{self.root}: ImageSets/Segmentation has no .txt list of images")
        self.classes: tuple[str, ...] = self._find_classes()

    @property
    def name(self) -> str:
        """The root's folder name, for reports."""
        return self.root.resolve().name

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.classes)

    def __repr__(self) -> str:
        return f"VOCFolder({str(self.root)!r}, {self.num_classes} classes, splits {', '.join(self.splits)})"

    def _find_classes(self) -> tuple[str, ...]:
        listed = self._classes_file or self.root / "classes.txt"
        if self._classes_file is not None or listed.is_file():
            if not listed.is_file():
                raise FileNotFoundError(f"{listed}: no such file of class names")
            names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
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
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or len(names) > MAX_CLASSES:
            got = f"{', '.join(twice)} more than once" if twice else len(names)
            raise InputError(f"{where}: expected at most {MAX_CLASSES} different class names, got {got}")
        return tuple(names)

    def ids(self, split: str) -> list[str]:
        """Image ids of ``ImageSets/Segmentation/<split>.txt``, or of a list file elsewhere, in the file's order.

        A `split` that ends in ".txt" is a file's path; its lines may name files (`read_list`), which `image` and `mask`
        then read. Raises ValueError for a split that the folder does not have, or a list that `read_list` refuses.
        """
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if split.endswith(".txt"):
            path = Path(split)
        elif split not in self.splits:
            raise InputError(
                f"{self.root}: no split {split!r}; ImageSets/Segmentation has {', '.join(self.splits)}; "
                "a list elsewhere is named by its path, which ends in .txt"
            )
        entries = read_list(path)
        self._listed.update({entry.id: entry for entry in entries if entry.image is not None})
        return [entry.id for entry in entries]

    def image_path(self, image_id: str) -> Path:
        """The image's file, whether it exists or not: what a list named, else ``JPEGImages/<id>.jpg``."""
        listed = self._listed.get(image_id)
        return self.root / (listed.image if listed and listed.image else f"JPEGImages/{image_id}.jpg")

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
        return read_label_png(self.mask_path(image_id), self.num_classes)

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


def load_image(path: Path) -> np.ndarray:
    """An image file's pixels, uint8 [H,W,3] RGB. FileNotFoundError where missing, ValueError where damaged."""
    with _open(path) as picture:
        return _load(path, picture, "RGB")


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return Image.open(path)
    except OSError as error:
        raise _damaged(path, error) from None


def _load(path: Path, picture: Image.Image, mode: str) -> np.ndarray:
    try:
        return np.array(picture.convert(mode))  # a copy: callers may write into it
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: how Pillow reports broken PNG chunks
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: expected a whole image file, got {path.stat().st_size} bytes that cannot be decoded ({error})"
    )


def _read_indices(path: Path) -> np.ndarray:
    with _open(path) as picture:
        if picture.mode not in ("P", "L"):
            raise InputError(f"{path}: expected a palette or 8-bit grey PNG, got mode {picture.mode}")
        return _load(path, picture, picture.mode)

"""Data folders of any layout by one name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from pssl.config.data import FolderConfig, Layout
from pssl.core.errors import InputError
from pssl.core.ranks import is_first, wait

from .coco import COCOFolder
from .photos import by_class_folders, by_table, class_folders, table_in
from .synthetic import SyntheticConfig, ensure_synthetic
from .voc import VOCFolder

__all__ = ["DataFolder", "Layout", "open_folder"]


class DataFolder(Protocol):
    """What training and evaluation ask of a folder; `VOCFolder` says what each answer means."""

    root: Path
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    name: str
    has_parts: bool
    read_as: str
    """How the folder was read."""
    notes: tuple[str, ...]
    """What was passed over."""

    def ids(self, split: str) -> list[str]: ...

    def image_path(self, image_id: str) -> Path: ...

    def mask_path(self, image_id: str) -> Path | None: ...

    def image(self, image_id: str) -> np.ndarray: ...

    def has_mask(self, image_id: str) -> bool: ...

    def mask(self, image_id: str) -> np.ndarray: ...

    def parts(self, image_id: str) -> np.ndarray | None: ...

    def image_labels(self, ids: Iterable[str]) -> np.ndarray: ...


def open_folder(
    root: str | Path,
    *,
    layout: Layout = "auto",
    labels: str = "auto",
    masks: str = "SegmentationClass",
    classes: Path | None = None,
    held_out: float = 0.2,
) -> DataFolder:
    """Return the folder at `root`, as its layout says.

    Args:
        layout: "voc", "coco", "folders" (a folder for each class), "table" (pictures, and a table of labels), "auto":
            COCO's where there is ``annotations/instances_*.json``, VOC's where there is ``JPEGImages``, else a table
            where there is labels.csv or labels.json or `labels` names one, else a folder for each class.
        labels: image-level labels: "auto", "main", "annotations" (`resolve_image_labels`), a .csv or .npy file
            (`labels_from_file`) for VOC and COCO; a table (`by_table`) for pictures.
        masks: a folder of ground-truth masks, below the root or anywhere; need not be there.
        classes: VOC only: a file of class names, one a line.
        held_out: share of the images in the split "val", where the folder has no lists.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of pictures, found none")
    table = Path(labels) if labels.lower().endswith((".csv", ".json")) else table_in(root)
    if layout == "auto":
        layout = _find_layout(root, table)
    if layout == "coco":
        if labels in ("main", "annotations"):
            raise InputError(f"data.labels: COCO's folder has 'auto' or a label file, got {labels!r}")
        return COCOFolder(root, label_file=None if labels == "auto" else Path(labels))
    if layout == "voc":
        return VOCFolder(root, label_source=labels, masks=masks, classes=classes, held_out=held_out)
    more = {"held_out": held_out, "masks": _masks_folder(root, masks)}
    if layout == "folders":
        if labels != "auto":
            raise InputError(f"data.labels: a folder for each class has 'auto' alone, got {labels!r}")
        return by_class_folders(root, **more)
    if table is None:
        raise FileNotFoundError(
            f"{root}: expected labels.csv or labels.json, or --data.labels FILE, found neither"
        )
    return by_table(root, table, **more)


def _find_layout(root: Path, table: Path | None) -> Layout:
    """Return the layout of a folder; InputError, naming what there could be, where it has none."""
    if any((root / "annotations").glob("instances_*.json")):
        return "coco"
    if (root / "JPEGImages").is_dir():
        return "voc"
    if table is not None:
        return "table"
    if class_folders(root):
        return "folders"
    inner = root / "VOCdevkit" / "VOC2012"
    hint = f"; did you mean {inner}?" if inner.is_dir() else ""
    raise InputError(
        f"{root}: expected a folder for each class, or pictures with labels.csv or labels.json, or VOC's layout "
        f"(JPEGImages), or COCO's (annotations/instances_*.json), found none of these{hint}"
    )


def _masks_folder(root: Path, masks: str) -> Path | None:
    """Return the folder of masks: below the root, or a path; None where the default one is not there."""
    found = root / masks  # an absolute path stays itself
    if found.is_dir():
        return found
    if Path(masks).is_dir():
        return Path(masks)
    if masks != "SegmentationClass":
        raise FileNotFoundError(f"data.masks: expected a folder of masks, {found} or {masks}, found neither")
    return None


def open_data(config: FolderConfig) -> DataFolder:
    """Return the data folder of the configuration; the embedded set is written first if need be."""
    if config.root is not None:
        return open_folder(
            config.root,
            layout=config.layout,
            labels=config.labels,
            masks=config.masks,
            classes=config.classes,
            held_out=config.held_out,
        )
    if is_first():
        ensure_synthetic(None, SyntheticConfig(variant=config.variant))
    wait()
    return VOCFolder(ensure_synthetic(None, SyntheticConfig(variant=config.variant)))

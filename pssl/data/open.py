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

    def ids(self, split: str) -> list[str]: ...

    def image_path(self, image_id: str) -> Path: ...

    def mask_path(self, image_id: str) -> Path | None: ...

    def image(self, image_id: str) -> np.ndarray: ...

    def mask(self, image_id: str) -> np.ndarray: ...

    def parts(self, image_id: str) -> np.ndarray | None: ...

    def image_labels(self, ids: Iterable[str]) -> np.ndarray: ...


def has_mask(folder: DataFolder, image_id: str) -> bool:
    """Whether an image has a mask to be scored by: its file is there, or there is none to be since COCO draws masks."""
    path = folder.mask_path(image_id)
    return path is None or path.is_file()


def open_folder(
    root: str | Path,
    *,
    layout: Layout = "auto",
    labels: str = "auto",
    masks: str = "SegmentationClass",
    classes: Path | None = None,
) -> DataFolder:
    """The folder at `root`.

    Args:
        layout: "voc", "coco", or "auto": COCO's where there is ``annotations/instances_*.json``, else VOC's.
        labels: image-level labels: "auto", "main", "annotations" (`resolve_image_labels`) or a .csv or .npy file
            (`labels_from_file`). COCO knows "auto", its annotations, and files.
        masks: VOC only: the folder of ground-truth masks.
        classes: VOC only: a file of class names, one a line.
    """
    root = Path(root)
    if layout == "auto":
        layout = "coco" if any((root / "annotations").glob("instances_*.json")) else "voc"
    if layout == "coco":
        if labels in ("main", "annotations"):
            raise InputError(f"data.labels: COCO's folder has 'auto' or a label file, got {labels!r}")
        return COCOFolder(root, label_file=None if labels == "auto" else Path(labels))
    return VOCFolder(root, label_source=labels, masks=masks, classes=classes)


def open_data(config: FolderConfig) -> DataFolder:
    """The data folder of the configuration; the embedded set is written first if need be."""
    if config.root is not None:
        return open_folder(
            config.root,
            layout=config.layout,
            labels=config.labels,
            masks=config.masks,
            classes=config.classes,
        )
    if is_first():
        ensure_synthetic(None, SyntheticConfig(variant=config.variant))
    wait()
    return VOCFolder(ensure_synthetic(None, SyntheticConfig(variant=config.variant)))

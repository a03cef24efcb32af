"""What is in a data folder, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from .voc import VOCFolder

__all__ = ["FolderSummary", "print_summary", "summarise"]

SHOWN_PROBLEMS = 20


@dataclass
class FolderSummary:
    """Counts and problems of a `VOCFolder`."""

    images: dict[str, int] = field(default_factory=dict)
    """Images by split."""
    class_images: dict[str, list[int]] = field(default_factory=dict)
    """By split, for each class the number of images with it, in `VOCFolder.classes`' order."""
    overlap: dict[tuple[str, str], int] = field(default_factory=dict)
    """Images that two splits share, for the pairs that share any."""
    problems: list[str] = field(default_factory=list)
    """Missing files, damaged files, labels that cannot be read: one line each, naming the file."""


def summarise(folder: VOCFolder, *, decode: bool = False) -> FolderSummary:
    """Read every split of `folder`; with `decode` also decode every image, mask and part map.

    Without `decode`, files are opened only as far as their headers: that they exist, are images, and that
    image and mask are of one size. Nothing found wrong is raised; it is listed in `problems`. A missing mask
    is a problem only in splits where some image has one.
    """
    summary = FolderSummary()
    members: dict[str, set[str]] = {}
    checked: set[str] = set()
    for split in folder.splits:
        try:
            ids = folder.ids(split)
        except (OSError, ValueError) as error:
            summary.problems.append(str(error))
            continue
        members[split] = set(ids)
        summary.images[split] = len(ids)
        try:
            summary.class_images[split] = folder.image_labels(ids).sum(0, dtype=int).tolist()
        except (OSError, ValueError) as error:
            summary.problems.append(str(error))
        with_masks = any(folder.mask_path(image_id).is_file() for image_id in ids)
        for image_id in ids:
            if image_id not in checked:
                checked.add(image_id)
                summary.problems += _check(folder, image_id, with_masks, decode)
    for first in members:
        for second in members:
            if first < second and members[first] & members[second]:
                summary.overlap[first, second] = len(members[first] & members[second])
    summary.problems = list(dict.fromkeys(summary.problems))
    return summary


def _check(folder: VOCFolder, image_id: str, with_masks: bool, decode: bool) -> list[str]:
    problems = []
    paths = [folder.image_path(image_id)] + ([folder.mask_path(image_id)] if with_masks else [])
    sizes = []
    for path in paths:
        try:
            sizes.append(_size(path))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        problems.append(f"{paths[1]}: expected the image's {sizes[0]} pixels (width, height), got {sizes[1]}")
    if decode and not problems:
        for read in (folder.image, *((folder.mask, folder.parts) if with_masks else ())):
            try:
                read(image_id)
            except (OSError, ValueError) as error:
                problems.append(str(error))
    return problems


def _size(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError:
        raise ValueError(f"{path}: not an image") from None


def print_summary(folder: VOCFolder, summary: FolderSummary, console: Console | None = None) -> None:
    """Print `summary` as a table of classes and splits, the overlaps, and the first problems."""
    console = console or Console()
    console.print(f"{folder.root}: {folder.num_classes} classes", highlight=False, markup=False)
    table = Table("region", "class", *summary.images, title="Images with the class")
    for index, name in enumerate(folder.classes):
        counts = [
            str(summary.class_images[split][index]) if split in summary.class_images else "?"
            for split in summary.images
        ]
        table.add_row(str(index + 1), name, *counts)
    table.add_section()
    table.add_row("", "all images", *(str(count) for count in summary.images.values()))
    console.print(table)
    for (first, second), count in summary.overlap.items():
        console.print(f"{first} and {second} share {count} images", markup=False)
    if "train" in summary.images and "val" in summary.images and ("train", "val") not in summary.overlap:
        console.print("train and val share no image")
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    hidden = len(summary.problems) - SHOWN_PROBLEMS
    console.print(f"… and {hidden} more" if hidden > 0 else f"{len(summary.problems)} problems")

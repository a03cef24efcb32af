"""What is in a data folder, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from .check import check_images, check_labels
from .open import DataFolder

__all__ = ["FolderSummary", "print_summary", "summarise"]

SHOWN_PROBLEMS = 20


@dataclass
class FolderSummary:
    """Counts and problems of a data folder."""

    images: dict[str, int] = field(default_factory=dict)
    """Images by split."""
    class_images: dict[str, list[int]] = field(default_factory=dict)
    """By split, for each class the number of images with it, in `VOCFolder.classes`' order."""
    usable: dict[str, int] = field(default_factory=dict)
    """By split, the images that can be trained on: the file is whole, the image-level labels can be read."""
    overlap: dict[tuple[str, str], int] = field(default_factory=dict)
    """Images that two splits share, for the pairs that share any."""
    problems: list[str] = field(default_factory=list)
    """Missing files, damaged files, labels that cannot be read: one line each, naming the file."""


def summarise(folder: DataFolder, splits: Sequence[str] = (), *, decode: bool = False) -> FolderSummary:
    """Read `splits` of `folder` (default: all that it has); with `decode` also decode every image and mask.

    Nothing found wrong is raised; it is listed in `problems`, as `check_images` finds it. A missing mask is a problem
    only in splits where some image has one.
    """
    summary = FolderSummary()
    members: dict[str, set[str]] = {}
    checked: set[str] = set()
    unusable: set[str] = set()
    for split in splits or folder.splits:
        try:
            ids = folder.ids(split)
        except (OSError, ValueError) as error:
            summary.problems.append(str(error))
            continue
        if not ids:
            summary.problems.append(f"{folder.root}, split {split}: expected images, its list names none")
        members[split] = set(ids)
        summary.images[split] = len(ids)
        unlabelled = check_labels(folder, ids)
        summary.problems += unlabelled.values()
        labelled = [image_id for image_id in ids if image_id not in unlabelled]
        if labelled or not unlabelled:
            summary.class_images[split] = folder.image_labels(labelled).sum(0, dtype=int).tolist()
        with_masks = any(folder.has_mask(image_id) for image_id in ids)
        fresh = [image_id for image_id in ids if image_id not in checked]
        checked.update(fresh)
        found = check_images(folder, fresh, masks=with_masks, decode=decode, compare=decode)
        summary.problems += found.lines()
        unusable |= found.images.keys() | unlabelled.keys()
        summary.usable[split] = len(ids) - len(unusable.intersection(ids))
    for first in members:
        for second in members:
            if first < second and members[first] & members[second]:
                summary.overlap[first, second] = len(members[first] & members[second])
    summary.problems = list(dict.fromkeys(summary.problems))
    return summary


def print_summary(folder: DataFolder, summary: FolderSummary, console: Console | None = None) -> None:
    """Print `summary` as a table of classes and splits, the overlaps, and the first problems."""
    console = console or Console()
    console.print(
        f"{folder.root}: {folder.read_as}; {len(folder.classes)} classes", highlight=False, markup=False
    )
    for note in folder.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    table = Table("region", "class", *summary.images, title="Images with the class")
    for index, name in enumerate(folder.classes):
        counts = [
            str(summary.class_images[split][index]) if split in summary.class_images else "?"
            for split in summary.images
        ]
        table.add_row(str(index + 1), name, *counts)
    table.add_section()
    table.add_row("", "all images", *(str(count) for count in summary.images.values()))
    if summary.usable != summary.images:
        table.add_row("", "that can be trained on", *(str(summary.usable[split]) for split in summary.images))
    console.print(table)
    for (first, second), count in summary.overlap.items():
        console.print(f"{first} and {second} share {count} image{'s'[: count != 1]}", markup=False)
    apart = [
        (first, second)
        for first in summary.images
        for second in summary.images
        if "train" in first and "val" in second and "train" not in second and "val" not in first
    ]
    for first, second in apart:
        if tuple(sorted((first, second))) not in summary.overlap:
            console.print(f"{first} and {second} share no image", markup=False, highlight=False)
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    hidden = len(summary.problems) - SHOWN_PROBLEMS
    if hidden > 0:
        console.print(f"… and {hidden} more")
    console.print(f"{len(summary.problems)} problem{'s'[: len(summary.problems) != 1]}")

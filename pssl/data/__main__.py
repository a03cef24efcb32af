"""``python -m pssl.data PATH``: what is in a VOC-layout folder, and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from .image_labels import LabelSource
from .summary import print_summary, summarise
from .voc import VOCFolder


def summary(path: tyro.conf.Positional[Path], labels: LabelSource = "auto", decode: bool = False) -> int:
    """Print images by split, classes with counts, overlap of splits, and problems.

    Args:
        path: a folder in VOC 2012's layout.
        labels: where image-level labels come from.
        decode: decode every image and mask, not only their headers.
    """
    try:
        folder = VOCFolder(path, label_source=labels)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found = summarise(folder, decode=decode)
    print_summary(folder, found)
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(summary, prog="python -m pssl.data"))

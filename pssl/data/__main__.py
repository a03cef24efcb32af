"""``python -m pssl.data PATH``: what is in a data folder, and what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from .label_files import write_label_csv
from .open import Layout, open_folder
from .summary import print_summary, summarise


def summary(
    path: tyro.conf.Positional[Path],
    splits: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    layout: Layout = "auto",
    labels: str = "auto",
    masks: str = "SegmentationClass",
    classes: Path | None = None,
    decode: bool = False,
    write_labels: Path | None = None,
) -> int:
    """Print images by split, classes with counts, overlap of splits, and problems.

    Args:
        path: a folder in VOC 2012's layout, or COCO's.
        splits: read this split, or this list (a path that ends in .txt); may be given several times. Default: all.
        layout: "voc", "coco", or "auto": COCO's where there is annotations/instances_*.json.
        labels: where image-level labels come from: "auto", "main", "annotations", or a .csv or .npy file.
        masks: VOC's folder of ground-truth masks; SegmentationClassAug for SBD's.
        classes: a file of class names, one a line. Default: found in the folder.
        decode: decode every image and mask, not only their headers, and compare masks with image-level labels.
        write_labels: write the image-level labels of these splits here, as CSV (a cls_labels.npy becomes readable so).
    """
    try:
        folder = open_folder(path, layout=layout, labels=labels, masks=masks, classes=classes)
        found = summarise(folder, splits, decode=decode)
        print_summary(folder, found)
        if write_labels is not None:
            ids = list(dict.fromkeys(i for split in splits or folder.splits for i in folder.ids(split)))
            write_label_csv(write_labels, ids, folder.image_labels(ids), folder.classes)
            print(f"{len(ids)} images in {write_labels}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(summary, prog="python -m pssl.data"))

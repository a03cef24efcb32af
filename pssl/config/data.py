"""Settings of the data: the folder, its splits, and how images are shown to a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pssl.config.values import PART, Floats, require

Layout = Literal["auto", "voc", "coco", "folders", "table"]


@dataclass
class FolderConfig:
    """Where images, image-level labels and masks are."""

    root: Path | None = None
    """Folder of pictures: a folder for each class, pictures with a table (labels.csv, labels.json), VOC's layout or
    COCO's. None: the embedded synthetic set, written once to the cache folder."""
    layout: Layout = "auto"
    """"voc": JPEGImages, SegmentationClass, ImageSets; "coco": annotations/instances_SPLIT.json and image folders;
    "folders": a folder for each class; "table": pictures and a table of labels; "auto": what is there."""
    variant: Literal["parts", "uniform"] = "parts"
    """Variant of the embedded set. "parts": objects have a small discriminative part and a plain body, which is
    where CAMs fail; "uniform": objects are discriminative all over (the control)."""
    labels: str = "auto"
    """Image-level labels: "main" (ImageSets/Main), "annotations" (XML), "auto" (XML where it is there, else Main;
    COCO: its objects; pictures: their folders or table), or a file: a table (.csv, .json), or the cls_labels.npy of
    AffinityNet and IRN, which is not unpickled."""
    masks: str = "SegmentationClass"
    """Folder of ground-truth masks, below the root or anywhere; masks are needed for scores alone, and may be there for
    some images only. VOC's own; SegmentationClassAug for those of SBD (Hariharan et al. 2011)."""
    held_out: float = 0.2
    """Share of the pictures that are held out, where the folder has no lists of images: drawn by a hash of each name,
    so that a picture is on the same side on every machine, whatever is added."""
    classes: Path | None = None
    """File of class names, one a line, line k being region k. None: the folder's classes.txt, else found in it."""
    check: Literal["headers", "decode", "nothing"] = "headers"
    """What every stage looks at before it starts: whether files are there, whole and of one size ("headers": first and
    last bytes; "decode": every pixel). Images that are not are named and left out."""

    def __post_init__(self) -> None:
        require("held_out", self.held_out, 0 <= self.held_out < 1, "a share of 0 or more, below 1")


@dataclass
class SplitsConfig:
    """Splits of the data set, and the input size."""

    train_split: str = "train"
    """Split to train on: a list of ImageSets/Segmentation (VOC), an annotation file's name (COCO: train2014), or the
    path of a list that ends in .txt and names images, or files: "JPEGImages/a.jpg SegmentationClassAug/a.png"."""
    val_split: str = "val"
    """Split held out, named likewise."""
    size: int = 96
    """Side in pixels of the square that training shows. 96: the embedded set's own size; SEAM 448, IRN 512."""

    def __post_init__(self) -> None:
        require("size", self.size, self.size >= 1, "1 or more")


@dataclass
class SplitDataConfig:
    """A data folder and its splits."""

    folder: Annotated[FolderConfig, PART] = field(default_factory=FolderConfig)
    splits: Annotated[SplitsConfig, PART] = field(default_factory=SplitsConfig)


@dataclass
class DataConfig:
    """A data folder, its splits, and how images are shown to the network."""

    folder: Annotated[FolderConfig, PART] = field(default_factory=FolderConfig)
    splits: Annotated[SplitsConfig, PART] = field(default_factory=SplitsConfig)
    loading: Literal["memory", "files"] = "memory"
    """"memory": every image is resized to a square of side `size` once, and kept. "files": images are read when they
    are needed, in their own proportions: cut to `size` for training, whole and as large as they are for CAMs (SEAM,
    IRN)."""
    zoom: Floats = (1.0, 1.25)
    """Training images are resized by a random factor, so that their longer side is `size` times a number of this range,
    then cut or padded to `size` at random. Measured on the embedded set; SEAM's 448 to 768 is (1, 1.714), IRN's 320 to
    640 for 512 is (0.625, 1.25). Not used with a frozen backbone, whose activations are cached."""
    colour_jitter: Floats = ()
    """Largest random changes of brightness, contrast, saturation (shares) and hue (turns) in training, four numbers;
    empty: none, as IRN. AffinityNet and SEAM: 0.3, 0.3, 0.3, 0.1."""
    workers: int = 4
    """Threads that read images while the network computes, for `loading: files`."""

    def __post_init__(self) -> None:
        rising = len(self.zoom) == 2 and 0 < self.zoom[0] <= self.zoom[1]
        require("zoom", self.zoom, rising, "two numbers above 0, the smaller first")

"""Data: folders in VOC's or COCO's layout, image-level labels, the embedded synthetic set, training transforms."""

from typing import TYPE_CHECKING, Any

from pssl.core.cache import cache_dir

from .check import check_images, check_labels
from .coco import COCOFolder
from .image_labels import from_annotations, from_image_sets, resolve_image_labels
from .label_files import labels_from_file, write_label_csv
from .open import DataFolder, open_folder
from .palette import colour_labels, voc_palette, write_label_png
from .synthetic import SyntheticConfig, ensure_synthetic, write_synthetic
from .voc import BODY, IGNORE, PART, VOCFolder

if TYPE_CHECKING:
    from .transforms import (
        IMAGENET_MEAN,
        IMAGENET_STD,
        multi_scale,
        normalise,
        random_colours,
        random_flip,
        random_labelled_crop,
        random_resized_crop,
        to_float,
    )

__all__ = [
    "BODY",
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PART",
    "COCOFolder",
    "DataFolder",
    "SyntheticConfig",
    "VOCFolder",
    "cache_dir",
    "check_images",
    "check_labels",
    "colour_labels",
    "ensure_synthetic",
    "from_annotations",
    "from_image_sets",
    "labels_from_file",
    "multi_scale",
    "normalise",
    "open_folder",
    "random_colours",
    "random_flip",
    "random_labelled_crop",
    "random_resized_crop",
    "resolve_image_labels",
    "to_float",
    "voc_palette",
    "write_label_csv",
    "write_label_png",
    "write_synthetic",
]


def __getattr__(name: str) -> Any:
    # Only the transforms need torch, which takes seconds to import; reading and writing folders does not.
    if name in __all__:
        from . import transforms

        return getattr(transforms, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

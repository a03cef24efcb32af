"""Data: VOC-layout folders, image-level labels, the embedded synthetic set, training transforms."""

from .cache import cache_dir
from .image_labels import from_annotations, from_image_sets, resolve_image_labels
from .palette import colour_labels, voc_palette, write_label_png
from .synthetic import SyntheticConfig, ensure_synthetic, write_synthetic
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    multi_scale,
    normalise,
    random_flip,
    random_resized_crop,
    to_float,
)
from .voc import BODY, IGNORE, PART, VOCFolder

__all__ = [
    "BODY",
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PART",
    "SyntheticConfig",
    "VOCFolder",
    "cache_dir",
    "colour_labels",
    "ensure_synthetic",
    "from_annotations",
    "from_image_sets",
    "multi_scale",
    "normalise",
    "random_flip",
    "random_resized_crop",
    "resolve_image_labels",
    "to_float",
    "voc_palette",
    "write_label_png",
    "write_synthetic",
]

"""pssl_ext: fused PyTorch operators for weakly supervised semantic segmentation.

>>> from pssl_ext import prototype_pool, prototype_contrast

Every operator has a plain PyTorch reference (its specification) and compiled kernels; ``explain(op, device)`` tells
which of them runs, ``python -m pssl_ext.env`` what was built.
"""

from pssl_ext.dispatch import load_native
from pssl_ext.memory import keep_memory, release_memory
from pssl_ext.op import explain
from pssl_ext.ops.cam_compare import cam_compare
from pssl_ext.ops.cam_regions import cam_regions
from pssl_ext.ops.cam_sweep import cam_sweep
from pssl_ext.ops.dense_crf import dense_crf
from pssl_ext.ops.pixel_refine import pixel_refine
from pssl_ext.ops.prototype_contrast import prototype_contrast
from pssl_ext.ops.prototype_pool import prototype_pool
from pssl_ext.ops.random_walk import random_walk

load_native()

__all__ = [
    "cam_compare",
    "cam_regions",
    "cam_sweep",
    "dense_crf",
    "explain",
    "keep_memory",
    "pixel_refine",
    "prototype_contrast",
    "prototype_pool",
    "random_walk",
    "release_memory",
]

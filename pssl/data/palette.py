"""The PASCAL VOC colour palette, and label images written with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pssl.core.errors import InputError
from pssl.core.files import write_atomically

__all__ = ["colour_labels", "label_image", "voc_palette", "write_label_png"]


def voc_palette(n: int = 256) -> list[int]:
    """The first `n` colours of the VOC palette, flat: ``[r0, g0, b0, r1, g1, b1, …]``, 0..255.

    As VOC's devkit makes it (``VOClabelcolormap.m``): three bits of the index at a time give the next lower
    bit of red, green and blue. Raises ValueError unless 1 ≤ n ≤ 256.
    """
    if not 1 <= n <= 256:
        raise InputError(f"voc_palette: n must be in 1..256, got {n}")
    # Bits 0, 3, 6 of the index are red's, 1, 4, 7 green's, 2, 5 blue's; low bits of the index come out
    # highest.
    return [
        sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for label in range(n)
        for channel in range(3)
    ]


_PALETTE = voc_palette()


def colour_labels(labels: np.ndarray) -> np.ndarray:
    """Label image uint8 [H,W] as VOC colours, uint8 [H,W,3]; 255 becomes VOC's pale border colour."""
    return np.asarray(_PALETTE, np.uint8).reshape(256, 3)[labels]


def label_image(labels: np.ndarray) -> Image.Image:
    """Label image uint8 [H,W] as a palette image whose indices are the labels and whose colours are VOC's.

    Raises ValueError for another dtype or number of dimensions, and for an image without pixels.
    """
    labels = np.asarray(labels)
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.size == 0:
        raise InputError(
            f"labels must be uint8 [H,W] with at least one pixel, got {labels.dtype} {list(labels.shape)}"
        )
    image = Image.fromarray(np.ascontiguousarray(labels))  # mode "L"; a palette turns it into "P"
    image.putpalette(_PALETTE)
    return image


def write_label_png(path: str | Path, labels: np.ndarray) -> None:
    """Write a label image uint8 [H,W] as a palette PNG whose indices are the labels, as VOC's masks are.

    The file appears whole or not at all; the same labels give the same bytes. Raises as `label_image` does.
    """
    image = label_image(labels)
    write_atomically(Path(path), lambda partial: image.save(partial, format="PNG"))

"""Splits of pictures without lists: drawn by a hash of each name, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["SPLITS", "held_out", "held_out_ids"]

SPLITS = ("train", "val")


def held_out(image_id: str) -> float:
    """Return a number in 0..1 by an image's id alone: pictures with low ones are held out."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out_ids(ids: Sequence[str], share: float) -> frozenset[str]:
    """Return the ids that are held out: those below the share; of two or more at least one, and not all."""
    order = sorted(ids, key=held_out)
    count = sum(held_out(image_id) < share for image_id in ids)
    count = min(max(count, 1), len(ids) - 1) if len(ids) > 1 and share > 0 else 0
    return frozenset(order[:count])

"""Masks from polygons and run lengths, as COCO's annotations give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pssl.core.errors import InputError

__all__ = ["decode_run_lengths", "fill_polygon", "parse_run_lengths"]


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies inside a polygon by the even-odd rule, bool [height,width].

    `points` floating [n,2] as (x, y); pixel (row r, column c) has its centre at (c + 0.5, r + 0.5). The outline closes
    itself. pycocotools draws on a grid five times finer and may differ by pixels that the outline passes through.
    """
    numbers = np.asarray(points, np.float64).ravel()
    if len(numbers) % 2:
        raise InputError(f"polygon: expected pairs of numbers, got {len(numbers)} numbers")
    start = numbers.reshape(-1, 2)
    if len(start) < 3:
        return np.zeros((height, width), bool)
    end = np.roll(start, -1, 0)
    # Each edge crosses the rows whose centre line lies between its ends, the lower end included, so that a line
    # through a corner meets one of the two edges there, or both, or none: never one too many.
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64)
    counts = last - first
    edge = np.repeat(np.arange(len(start)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    share = (row + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    x = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    crossings = np.zeros((height, width + 1), np.int32)
    np.add.at(crossings, (row, column), 1)
    return np.cumsum(crossings[:, :width], axis=1) % 2 == 1


def parse_run_lengths(text: str) -> list[int]:
    """The counts in COCO's compressed text: five bits a character, least first, from the fourth on as differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise InputError(f"run lengths: expected characters '0' to 'o', got {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise InputError("run lengths: the text ends within a number")
    return counts


def decode_run_lengths(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """The mask bool [height,width] of run lengths down the columns, beginning with zeros.

    ValueError unless the counts are not negative and add up to height x width.
    """
    runs = np.asarray(counts, np.int64)
    if runs.size == 0 or runs.min() < 0 or runs.sum() != height * width:
        raise InputError(
            f"run lengths: expected counts that add up to {height} x {width}, got {int(runs.sum())}"
        )
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T

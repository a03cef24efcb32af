"""Read MXNet's NDArray list files (``.params``) with nothing but struct and numpy.

The format, little-endian: u64 0x112, u64 0, then a counted list of arrays and a counted list of names, each count a
u64, each name a u64 length and bytes. An array is, by its first u32:

    0xF993FAC9 (v2), 0xF993FACA (v3)   i32 storage type (0: dense), then as v1 from the shape on
    0xF993FAC8 (v1)                    shape: u32 dimensions and an i64 for each; the body
    anything else (before v1)          it is the number of dimensions, with a u32 for each; the body

and the body is i32 device type, i32 device number, i32 element type, the elements. v1 and v2 write an array that holds
nothing as a shape of no dimensions, without a body; v3 writes -1 dimensions.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from pssl.core.errors import InputError

__all__ = ["read_params"]

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "|u1", 4: "<i4", 5: "|i1", 6: "<i8"}  # mshadow's type flags
MAX_DIMENSIONS = 32


class _Reader:
    """The bytes of a file, taken from the front; asking for more than there are is an error with the place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.at = 0

    def fail(self, expected: str, got: object) -> InputError:
        return InputError(f"{self.path}: at byte {self.at}, expected {expected}, got {got}")

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if count > left:
            raise self.fail(f"{count} bytes of {what}", f"{left} up to the end of the file")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), what))

    def number(self, layout: str, what: str) -> int:
        return self.numbers(layout, what)[0]

    def count(self, what: str, smallest: int) -> int:
        """Read a u64 count of `what`, of at least `smallest` bytes each, so that a false one allocates nothing."""
        count = self.number("Q", f"the number of {what}")
        if count * smallest > len(self.data) - self.at:
            raise self.fail(f"at most {(len(self.data) - self.at) // smallest} {what}", count)
        return count


def read_params(path: Path) -> dict[str, np.ndarray]:
    """Read the named arrays of an NDArray list file, in its order; each an array of its own, writable.

    Raises FileNotFoundError; InputError, naming the file, the place and what was expected there, for another kind of
    file, a truncated one, one with bytes left over, sparse arrays, unknown element types, and names that are missing,
    doubled or no UTF-8. Nothing in the file is ever run, and no length in it is trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file at {path}, found none")
    reader = _Reader(path)
    magic, _reserved = reader.numbers("QQ", "the header")
    if magic != LIST_MAGIC:
        raise InputError(f"{path}: expected MXNet's NDArray list (0x112 first), got {magic:#x}")
    arrays = [_read_array(reader) for _ in range(reader.count("arrays", 4))]
    names = [_read_name(reader) for _ in range(reader.count("names", 8))]
    if reader.at != len(reader.data):
        raise reader.fail("the end of the file", f"{len(reader.data) - reader.at} more bytes")
    if len(names) != len(arrays) or len(set(names)) != len(names):
        raise InputError(
            f"{path}: expected {len(arrays)} different names, got {len(set(names))} of {len(names)}"
        )
    return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}


def _read_name(reader: _Reader) -> str:
    raw = bytes(reader.take(reader.count("bytes of a name", 1), "a name"))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise reader.fail("a name in UTF-8", f"other bytes ({error.reason})") from None


def _read_array(reader: _Reader) -> np.ndarray | None:
    """Read one array; None for one that holds nothing."""
    magic = reader.number("I", "an array's first word")
    if magic in (V2, V3):
        storage = reader.number("i", "a storage type")
        if storage != 0:
            raise reader.fail("a dense array (storage type 0)", f"storage type {storage}")
    if magic in (V1, V2, V3):
        dimensions, letter = reader.number("i", "the number of dimensions"), "q"
        empty = dimensions == (-1 if magic == V3 else 0)
    else:
        dimensions, letter = magic, "I"
        empty = dimensions == 0
    if empty:
        return None
    if not 0 <= dimensions <= MAX_DIMENSIONS:
        raise reader.fail(f"at most {MAX_DIMENSIONS} dimensions", dimensions)
    shape = reader.numbers(f"{dimensions}{letter}", "a shape")
    if any(side < 0 for side in shape):
        raise reader.fail("sides of at least 0", list(shape))
    _device, _number, flag = reader.numbers("iii", "device and element type")
    if flag not in DTYPES:
        raise reader.fail(f"an element type of {sorted(DTYPES)}", flag)
    dtype = np.dtype(DTYPES[flag])
    size = 1
    for side in shape:  # in Python's integers, which do not overflow
        size *= side
    elements = reader.take(size * dtype.itemsize, f"an array {list(shape)} of {dtype.name}")
    return np.frombuffer(elements, dtype).reshape(shape).copy()

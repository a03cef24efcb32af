"""Image-level labels in a file of their own: CSV, or the ``cls_labels.npy`` of AffinityNet, IRN and others.

A CSV has one of two headers. ``image,<class>,<class>,…`` is followed by a line of 0 and 1 for each image;
``image,classes`` by the names of the image's classes, separated by semicolons.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pssl.core.errors import InputError
from pssl.core.files import write_text

from .inert_pickle import read_array_dict
from .pictures import ENDINGS

__all__ = ["labels_from_file", "write_label_csv"]


def labels_from_file(path: Path, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels uint8 [N,K] of `ids` in `classes`' order, from a .csv or .npy file.

    A .npy is never unpickled (see `inert_pickle`); its arrays [K] of 0 and 1 are in the order of `classes`, and its
    keys are image ids or the numbers in them, as IRN writes (2007000032 for 2007_000032). Raises FileNotFoundError for
    a missing file and, naming images and file, for images that it does not hold; ValueError for everything else that
    is wrong with it.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".npy"):
        raise InputError(f"{path}: expected image labels in a .csv or .npy file")
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    rows = _rows_of(path, tuple(classes), changed)
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    missing = []
    for row, image_id in enumerate(ids):
        found = next((rows[key] for key in _keys(image_id) if key in rows), None)
        if found is None:
            missing.append(image_id)
        else:
            labels[row] = found
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{path}: no image-level labels for {', '.join(missing[:3])}{more}")
    return labels


@lru_cache(2)  # checks ask again and again
def _rows_of(path: Path, classes: tuple[str, ...], changed: int) -> dict[str | int, np.ndarray]:
    return _from_csv(path, classes) if path.suffix == ".csv" else _from_npy(path, classes)


def _keys(image_id: str) -> Iterable[str | int]:
    """What a file may call an image: its id, all its digits as a number (VOC), its last digits as one (COCO)."""
    yield image_id
    runs = re.findall(r"\d+", image_id)
    if runs:
        yield int("".join(runs))
        yield int(runs[-1])


def read_table_text(path: Path) -> str:
    """Return a table's text: UTF-8, or UTF-16 with its byte order mark, as spreadsheets write it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file")
    content = path.read_bytes()
    encoding = (
        "utf-16" if len(content) % 2 == 0 and content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, got other bytes ({error.reason})") from None


def _from_csv(path: Path, classes: Sequence[str]) -> dict[str | int, np.ndarray]:
    try:
        lines = list(csv.reader(io.StringIO(read_table_text(path), newline="")))
    except csv.Error as error:
        raise InputError(f"{path}: expected CSV, got: {error}") from None
    header = [name.strip() for name in lines[0]] if lines else []
    column = {name: index for index, name in enumerate(classes)}
    listed = header[1:] == ["classes"]
    unknown = [] if listed else [name for name in header[1:] if name not in column]
    absent = [] if listed else [name for name in classes if name not in header[1:]]
    if not header or header[0] != "image" or unknown or absent or len(set(header)) != len(header):
        raise InputError(
            f"{path}, line 1: expected 'image,classes' or 'image' and the classes {', '.join(classes)}; got "
            f"{','.join(header[:9])}" + (f"; unknown: {', '.join(unknown[:5])}" if unknown else "")
        )
    rows: dict[str | int, np.ndarray] = {}
    for number, fields in enumerate(lines[1:], 2):
        if not fields:
            continue
        where = f"{path}, line {number}"
        if len(fields) != len(header):
            raise InputError(f"{where}: expected {len(header)} fields, got {len(fields)}")
        row = np.zeros(len(classes), np.uint8)
        for name, value in zip(header[1:], fields[1:], strict=True):
            present = [part.strip() for part in value.split(";") if part.strip()] if listed else [name]
            wrong = [part for part in present if part not in column]
            if wrong or (not listed and value.strip() not in ("0", "1")):
                expected = f"names of {', '.join(classes)}" if listed else "0 or 1"
                raise InputError(f"{where}: expected {expected}, got {value!r}")
            if listed or value.strip() == "1":
                row[[column[part] for part in present]] = 1
        image_id = _without_ending(fields[0].strip())
        if image_id in rows:
            raise InputError(f"{where}: image {image_id!r} stands there twice")
        rows[image_id] = row
    return rows


def _without_ending(name: str) -> str:
    """Return an image's id where a table names its file."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in ENDINGS else name


def _from_npy(path: Path, classes: Sequence[str]) -> dict[str | int, np.ndarray]:
    rows: dict[str | int, np.ndarray] = {}
    for key, values in read_array_dict(path).items():
        if values.shape != (len(classes),) or not np.isin(values, (0, 1)).all():
            raise InputError(
                f"{path}: expected {len(classes)} values of 0 or 1 for image {key!r}, got {list(values.shape)} "
                f"with {np.unique(values)[:5].tolist()}"
            )
        rows[key] = values.astype(np.uint8)
    return rows


def write_label_csv(path: Path, ids: Sequence[str], labels: np.ndarray, classes: Sequence[str]) -> None:
    """Write labels uint8 [N,K] as a CSV of 0 and 1 that `labels_from_file` reads; whole or not at all."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", *classes])
    writer.writerows([image_id, *row] for image_id, row in zip(ids, labels.tolist(), strict=True))
    write_text(Path(path), stream.getvalue())

"""Folders of photographs as people have them: a folder for each class, or one folder and a table of labels.

Neither has lists of images: a split is made by a hash of each picture's name, the same on every machine. Masks are
optional, for some pictures only, in a folder of their own.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pssl.core.errors import InputError

from .hashing import SPLITS, held_out_ids
from .label_files import read_table_text
from .pictures import find_picture, is_hidden, load_image, pictures_in
from .voc import check_class_names, mask_like_image, read_label_png

__all__ = ["Photo", "PhotoFolder", "by_class_folders", "by_table", "class_folders", "table_in"]

TABLES = ("labels.csv", "labels.json")
SEPARATORS = ";|"


@dataclass(frozen=True)
class Photo:
    """A picture and the classes it shows."""

    id: str
    path: Path
    labels: frozenset[str]


class PhotoFolder:
    """Photographs with image-level labels, and masks of some of them; a `DataFolder`, as `VOCFolder` is.

    Args:
        root: the folder.
        photos: its pictures (:func:`by_class_folders`, :func:`by_table`).
        classes: class names, region 1 first.
        held_out: share of the pictures in the split "val", drawn by a hash of their names.
        masks: folder of ground-truth masks, palette or grey PNGs; the mask of a picture has its name. None: no masks.
        read_as: how the folder was read, for reports.
        notes: what was passed over, a line each, for reports.
    """

    has_parts = False

    def __init__(
        self,
        root: Path,
        photos: Sequence[Photo],
        classes: Sequence[str],
        *,
        held_out: float = 0.2,
        masks: Path | None = None,
        read_as: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.root = Path(root)
        self.classes = tuple(classes)
        self.read_as = f"{read_as}; {held_out:.0%} held out by a hash of names"
        self.notes = tuple(notes)
        self.splits = SPLITS
        self._masks = masks
        self._photos = {photo.id: photo for photo in photos}
        self._stems = Counter(photo.path.stem for photo in photos)
        self._held = held_out_ids(sorted(self._photos), held_out)
        if not photos:
            raise InputError(f"{self.root}: expected pictures, found none")

    @property
    def name(self) -> str:
        """The root's folder name, for reports."""
        return self.root.resolve().name

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.classes)

    def __repr__(self) -> str:
        return f"PhotoFolder({str(self.root)!r}, {len(self._photos)} pictures, {self.num_classes} classes)"

    def ids(self, split: str) -> list[str]:
        """Return the image ids of "train" or "val", sorted."""
        if split not in SPLITS:
            raise InputError(f"{self.root}: no split {split!r}; pictures without lists have train and val")
        return [image_id for image_id in sorted(self._photos) if (image_id in self._held) == (split == "val")]

    def _photo(self, image_id: str) -> Photo:
        if image_id not in self._photos:
            raise FileNotFoundError(f"{self.root}: no picture {image_id!r}")
        return self._photos[image_id]

    def image_path(self, image_id: str) -> Path:
        """Return the picture's file, whether it exists or not."""
        return self._photo(image_id).path

    def image(self, image_id: str) -> np.ndarray:
        """Return the picture, uint8 [H,W,3] RGB. FileNotFoundError where missing, InputError where damaged."""
        return load_image(self.image_path(image_id))

    @cached_property
    def _mask_files(self) -> dict[str, Path]:
        """Masks by their place in the folder without ending, and by their name where only one has it."""
        if self._masks is None:
            return {}
        files = [path for path in pictures_in(self._masks) if path.suffix.lower() == ".png"]
        stems = Counter(path.stem for path in files)
        found = {path.stem: path for path in files if stems[path.stem] == 1}
        return found | {image_id_of(path, self._masks): path for path in files}

    def mask_path(self, image_id: str) -> Path | None:
        """Return the picture's mask, None for a picture without one."""
        stem = self._photo(image_id).path.stem
        by_name = self._mask_files.get(stem) if self._stems[stem] == 1 else None
        return self._mask_files.get(image_id) or by_name

    def has_mask(self, image_id: str) -> bool:
        """Return whether the picture has a mask."""
        return self.mask_path(image_id) is not None

    def mask(self, image_id: str) -> np.ndarray:
        """Return the ground truth uint8 [H,W], as `VOCFolder.mask` does."""
        path = self.mask_path(image_id)
        if path is None:
            raise FileNotFoundError(f"{self.root}: no mask of {image_id!r}")
        return mask_like_image(read_label_png(path, self.num_classes), self.image_path(image_id))

    def parts(self, image_id: str) -> None:
        """Return None: nothing says which parts of objects are discriminative."""
        return None

    def image_labels(self, ids: Iterable[str]) -> np.ndarray:
        """Return image-level labels uint8 [N,K], 1 where the class is in the picture."""
        photos = [self._photo(image_id) for image_id in ids]
        rows = [[name in photo.labels for name in self.classes] for photo in photos]
        return np.array(rows, np.uint8).reshape(len(photos), self.num_classes)


def image_id_of(path: Path, root: Path) -> str:
    """Return a picture's id: its place below the root without ending, folders joined by "__", letters composed (NFC).

    Ids name files that are made of the pictures, so they hold no folders.
    """
    inner = path.relative_to(root).with_suffix("")
    return unicodedata.normalize("NFC", "__".join(inner.parts))


def _photos_of(root: Path, paths: Iterable[tuple[Path, frozenset[str]]]) -> list[Photo]:
    """Return pictures with ids; those that would share one keep their endings."""
    paths = list(paths)
    shared = Counter(image_id_of(path, root) for path, _ in paths)
    found = []
    for path, labels in paths:
        image_id = image_id_of(path, root)
        if shared[image_id] > 1:
            image_id += path.suffix
        found.append(Photo(image_id, path, labels))
    twice = [image_id for image_id, count in Counter(photo.id for photo in found).items() if count > 1]
    if twice:
        files = [str(photo.path) for photo in found if photo.id == twice[0]]
        raise InputError(f"{root}: expected pictures with different names, got {' and '.join(files)}")
    return found


# -- a folder for each class -----------------------------------------------------------------------------------------


def class_folders(root: Path) -> list[Path]:
    """Return the folders of a root that hold pictures, by their names; [] where pictures lie beside them."""
    if next(pictures_in(root, below=False), None) is not None:
        return []
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not is_hidden(entry.name)]
    return [folder for folder in folders if next(pictures_in(folder), None) is not None]


def by_class_folders(root: Path, *, masks: Path | None = None, **more) -> PhotoFolder:
    """Return a folder whose sub-folders are named like the class that all of their pictures show.

    As torchvision's ImageFolder, at any depth below. A picture in several folders is not guessed to be the same. A
    folder of masks beside them is no class.
    """
    folders = [folder for folder in class_folders(root) if masks is None or not folder.samefile(masks)]
    classes = check_class_names([folder.name for folder in folders], str(root))
    paths = [(path, frozenset({folder.name})) for folder in folders for path in pictures_in(folder)]
    return PhotoFolder(
        root,
        _photos_of(root, paths),
        classes,
        masks=masks,
        read_as=f"a folder for each of {len(classes)} classes",
        **more,
    )


# -- a table of labels -----------------------------------------------------------------------------------------------


def table_in(root: Path) -> Path | None:
    """Return labels.csv or labels.json of a folder, None where there is neither."""
    return next((root / name for name in TABLES if (root / name).is_file()), None)


def by_table(root: Path, table: Path, **more) -> PhotoFolder:
    """Return a folder of pictures whose labels stand in a table.

    A CSV has a header: ``file,labels`` with labels separated by ";" or "|", or ``file`` and a column of 0 and 1 for
    each class. A JSON file holds an object: file to list of labels. Files are named below the root, with or without
    ending. Pictures that the table does not name are passed over, and so are its lines without a picture; notes say how
    many.
    """
    named = read_json_table(table) if table.suffix.lower() == ".json" else read_csv_table(table)
    names, rows = named
    classes = check_class_names(names, str(table))
    paths, missing = [], []
    for file, labels in rows.items():
        path = _below(root, file, table)
        if path is None:
            missing.append(file)
        else:
            paths.append((path, frozenset(labels)))
    notes = []
    if missing:
        notes.append(f"{table}: {len(missing)} lines name no picture below {root}, such as {missing[0]!r}")
    listed = {path for path, _ in paths}
    others = [path for path in pictures_in(root) if path not in listed]
    if others:
        notes.append(f"{table}: {len(others)} pictures have no line, such as {others[0].relative_to(root)}")
    if not paths:
        raise InputError(
            f"{table}: expected lines that name pictures below {root}, found none; {'; '.join(notes)}"
        )
    return PhotoFolder(
        root,
        _photos_of(root, paths),
        classes,
        read_as=f"pictures and a table, {table.name}",
        notes=notes,
        **more,
    )


def _below(root: Path, file: str, table: Path) -> Path | None:
    """Return the picture that a table names, None where there is none; InputError for a path that leaves the root."""
    inner = Path(file.replace("\\", "/").lstrip("/"))
    if ".." in inner.parts:
        raise InputError(f"{table}: expected files below {root}, got {file!r}")
    if (root / inner).is_file():
        return root / inner
    found = find_picture((root / inner).parent, inner.name)
    return found if found.is_file() else None


def read_csv_table(table: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the classes and, by file, the labels of a CSV table (:func:`by_table`)."""
    try:
        lines = list(csv.reader(io.StringIO(read_table_text(table), newline="")))
    except csv.Error as error:
        raise InputError(f"{table}: expected CSV, got: {error}") from None
    header = [name.strip() for name in lines[0]] if lines else []
    if len(header) < 2 or header[0].lower() not in ("file", "image", "filename", "path"):
        raise InputError(
            f"{table}, line 1: expected a header, file,labels or file and a column for each class, got "
            f"{','.join(header)[:80]!r}"
        )
    listed = len(header) == 2 and header[1].lower() in ("labels", "label", "classes", "tags")
    rows: dict[str, list[str]] = {}
    for number, fields in enumerate(lines[1:], 2):
        if not any(field.strip() for field in fields):
            continue
        where = f"{table}, line {number}"
        if len(fields) != len(header):
            raise InputError(f"{where}: expected {len(header)} fields, got {len(fields)}")
        file, values = fields[0].strip(), [value.strip() for value in fields[1:]]
        if not file or file in rows:
            raise InputError(f"{where}: expected a file that stands on no other line, got {file!r}")
        rows[file] = _split(values[0]) if listed else _marked(header[1:], values, where)
    classes = sorted({name for labels in rows.values() for name in labels}) if listed else header[1:]
    return classes, rows


def _split(value: str) -> list[str]:
    for separator in SEPARATORS[1:]:
        value = value.replace(separator, SEPARATORS[0])
    return [part.strip() for part in value.split(SEPARATORS[0]) if part.strip()]


def _marked(classes: list[str], values: list[str], where: str) -> list[str]:
    wrong = [value for value in values if value not in ("0", "1")]
    if wrong:
        raise InputError(f"{where}: expected 0 or 1 for each class, got {wrong[0]!r}")
    return [name for name, value in zip(classes, values, strict=True) if value == "1"]


def read_json_table(table: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the classes and, by file, the labels of a JSON table (:func:`by_table`)."""
    try:
        values = json.loads(read_table_text(table))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{table}: expected JSON, got: {error}") from None
    sound = isinstance(values, dict) and all(
        isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        for labels in values.values()
    )
    if not sound:
        raise InputError(f"{table}: expected an object, file to list of labels, got {str(values)[:80]!r}")
    rows = {file.strip(): [label.strip() for label in labels] for file, labels in values.items()}
    return sorted({label for labels in rows.values() for label in labels}), rows

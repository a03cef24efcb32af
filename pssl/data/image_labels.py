"""Image-level labels of a VOC 2012 folder, from ImageSets/Main, from Annotations, or from a file of their own.

An image has a class when any object of it is there, *difficult* ones included: in ImageSets/Main that is the
value 0 as well as 1, in Annotations every ``<object>`` whatever its ``<difficult>``. This is how the label
files of AffinityNet, IRN, SEAM and those after them were made, and only so do the two sources agree, since a
difficult object is drawn in VOC's segmentation masks like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from pssl.core.errors import InputError

from .label_files import labels_from_file, read_table_text

__all__ = [
    "LabelSource",
    "ListedImage",
    "annotation_objects",
    "check_id",
    "class_files",
    "from_annotations",
    "from_image_sets",
    "read_list",
    "resolve_image_labels",
]

LabelSource = str
""""auto", "main", "annotations", or the path of a .csv or .npy file."""

STANDARD_SPLITS = ("train", "val", "trainval", "test")
MAX_XML_BYTES = 4 << 20  # VOC's largest annotation has 30 kB; anything far above is not one


@dataclass(frozen=True)
class ListedImage:
    """A line of a list: the image's id, and the files of image and mask where the list names them."""

    id: str
    image: str | None = None
    mask: str | None = None


def check_id(image_id: str, where: str) -> None:
    """ValueError unless an image id can be a file name: no path separator, no leading dot."""
    if not image_id or "/" in image_id or "\\" in image_id or image_id.startswith("."):
        raise InputError(f"{where}: expected an image id such as 2007_000032, got {image_id!r}")


def read_list(path: Path, is_image: Callable[[str], bool] = lambda name: False) -> list[ListedImage]:
    """The images of a list file, in order: an id a line, or files as the lists of SBD's train_aug name them.

    A line is ``2007_000032``, whatever follows, or ``/JPEGImages/a.jpg /SegmentationClassAug/a.png``, image and (if
    there) mask, below the data folder; the id is then the image's file name. An id with blanks is taken whole where
    `is_image` says that the line is one. Raises FileNotFoundError where the list is missing; InputError, naming file
    and line, for an id that is no file name, a path that leaves the data folder, and an id that stands there twice.
    """
    found: dict[str, ListedImage] = {}
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        image = mask = None
        fields = [line] if is_image(line) else line.split()
        image_id = fields[0]
        if Path(fields[0]).suffix.lower() in (".jpg", ".jpeg", ".png"):
            image, mask = _inside(fields[0], where), _inside(fields[1], where) if len(fields) > 1 else None
            image_id = Path(image).stem
        check_id(image_id, where)
        if image_id in found:
            hint = "; a blank ends an id, unless the line names a picture" if " " in line else ""
            raise InputError(f"{where}: image {image_id!r} is already on line {lines[image_id]}{hint}")
        found[image_id], lines[image_id] = ListedImage(image_id, image, mask), number
    return list(found.values())


def _inside(name: str, where: str) -> str:
    """A path below the data folder, without the leading slash that these lists have."""
    inner = name.lstrip("/")
    if not inner or ".." in Path(inner).parts or "\\" in inner:
        raise InputError(f"{where}: expected a file below the data folder, got {name!r}")
    return inner


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a list that are not empty, with their numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of images")
    lines = read_table_text(path).splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def class_files(root: Path, splits: Sequence[str] = ()) -> dict[str, list[Path]]:
    """``ImageSets/Main/<class>_<split>.txt`` files by class name, sorted; {} where there is no such folder.

    A split is one of train, val, trainval, test, or of `splits`, or the name of a plain list in the folder.
    VOC has a class called "train": ``train_val.txt`` belongs to it, ``train.txt`` and ``trainval.txt`` are
    plain lists. Class lists have two columns, so a plain list called ``train_aug.txt`` is no class either.
    """
    folder = Path(root) / "ImageSets" / "Main"
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    plain = {file.stem for file in files if "_" not in file.stem}
    known = sorted({*STANDARD_SPLITS, *splits, *plain}, key=lambda split: (-len(split), split))
    found: dict[str, list[Path]] = {}
    for file in files:
        suffix = next((f"_{split}" for split in known if file.stem.endswith(f"_{split}")), None)
        name = file.stem.removesuffix(suffix) if suffix else ""
        if name and _has_two_columns(file):
            found.setdefault(name, []).append(file)
    return dict(sorted(found.items()))


def _has_two_columns(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "a 1")  # an empty class list is still one
    fields = first.split()
    return len(fields) == 2 or (len(fields) > 2 and fields[-1] in ("-1", "0", "1"))  # ids may hold blanks


def from_image_sets(root: str | Path, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels uint8 [N,K] of `ids` from ``ImageSets/Main/<class>_<split>.txt``: 1 where the value is 1 or 0.

    0 is VOC's "difficult" and counts as present (see the module). Raises FileNotFoundError where a class has
    no file or an image is in none of its files, ValueError for a value other than -1, 0, 1 and for files that
    contradict each other; all name the file.
    """
    labels, missing = _main_labels(Path(root), ids, classes)
    if missing:
        raise FileNotFoundError(f"{Path(root) / 'ImageSets' / 'Main'}: no class list names {_some(missing)}")
    return labels


def _main_labels(root: Path, ids: Sequence[str], classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    files = class_files(root)
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    seen = np.zeros(labels.shape, bool)
    for column, name in enumerate(classes):
        if name not in files:
            raise FileNotFoundError(
                f"{root / 'ImageSets' / 'Main'}: no list of class {name!r} ({name}_train.txt, …)"
            )
        values: dict[str, str] = {}
        for path in files[name]:
            for number, line in _lines(path):
                fields = line.rsplit(maxsplit=1)
                if len(fields) != 2 or fields[1] not in ("-1", "0", "1"):
                    got = " ".join(fields)
                    raise InputError(
                        f"{path}, line {number}: expected an image id and -1, 0 or 1, got {got!r}"
                    )
                if values.setdefault(fields[0], fields[1]) != fields[1]:
                    raise InputError(
                        f"{path}, line {number}: {fields[0]} has {fields[1]} here and {values[fields[0]]} "
                        f"in another list of class {name!r}"
                    )
        for row, image_id in enumerate(ids):
            if image_id in values:
                seen[row, column] = True
                labels[row, column] = values[image_id] != "-1"
    partly = np.flatnonzero(seen.any(1) & ~seen.all(1))
    if partly.size:
        name = classes[int(np.argmin(seen[partly[0]]))]
        raise FileNotFoundError(
            f"{root / 'ImageSets' / 'Main'}: lists of other classes name {ids[partly[0]]}, those of {name!r} "
            f"({', '.join(file.name for file in files[name])}) do not"
        )
    return labels, [image_id for image_id, row in zip(ids, seen, strict=True) if not row.any()]


def annotation_objects(path: str | Path) -> list[str]:
    """Class names of the objects of one VOC annotation file, in file order, repeated as the objects are.

    Only ``<object><name>``; the names of body parts below ``<part>`` are something else. The XML may hold no
    DTD, and so no entities of its own (nothing is expanded, nothing is fetched). Raises FileNotFoundError,
    and ValueError for XML that is broken, has a DTD, is no ``<annotation>``, or has an object without a name.
    """
    path = Path(path)
    root = _parse_xml(path)
    if root.tag != "annotation":
        raise InputError(f"{path}: expected an <annotation> document, got <{root.tag}>")
    names = [(thing.findtext("name") or "").strip() for thing in root.findall("object")]
    if "" in names:
        raise InputError(f"{path}: object {names.index('') + 1} has no <name>")
    return names


def _parse_xml(path: Path) -> ElementTree.Element:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    if path.stat().st_size > MAX_XML_BYTES:
        raise InputError(
            f"{path}: expected an annotation of at most {MAX_XML_BYTES} bytes, got {path.stat().st_size}"
        )

    def refuse(*_: object) -> None:
        raise InputError(f"{path}: a DTD or entity declaration is not accepted in an annotation")

    # ElementTree's own parser gives no hook on declarations, hence expat by hand.
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except expat.ExpatError as error:
        raise InputError(f"{path}: expected well-formed XML, got: {error}") from None


def from_annotations(root: str | Path, ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels uint8 [N,K] of `ids` from ``Annotations/<id>.xml``; difficult objects count (see the module).

    Raises FileNotFoundError for an image without annotation, ValueError for an object of an unknown class and
    for XML that `annotation_objects` refuses; all name the file.
    """
    columns = {name: column for column, name in enumerate(classes)}
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    for row, image_id in enumerate(ids):
        path = Path(root) / "Annotations" / f"{image_id}.xml"
        for name in annotation_objects(path):
            if name not in columns:
                raise InputError(f"{path}: expected objects of {', '.join(classes)}; got {name!r}")
            labels[row, columns[name]] = 1
    return labels


def resolve_image_labels(
    root: str | Path, ids: Sequence[str], classes: Sequence[str], source: LabelSource = "auto"
) -> np.ndarray:
    """Labels uint8 [N,K] of `ids`, in `classes`' order, from the source asked for.

    "main" and "annotations" are `from_image_sets` and `from_annotations`, a .csv or .npy file `labels_from_file`.
    "auto" (default) takes an image's annotation where there is one, as peers do, and ImageSets/Main for the others.
    Raises FileNotFoundError for images with neither, naming them and both places; ValueError for another `source`.
    """
    if source == "main":
        return from_image_sets(root, ids, classes)
    if source == "annotations":
        return from_annotations(root, ids, classes)
    if Path(source).suffix in (".csv", ".npy"):
        return labels_from_file(Path(source), ids, classes)
    if source != "auto":
        raise InputError(
            f"label source must be 'auto', 'main', 'annotations' or a .csv or .npy file, got {source!r}"
        )
    root = Path(root)
    annotated = [(root / "Annotations" / f"{image_id}.xml").is_file() for image_id in ids]
    with_xml = [row for row, there in enumerate(annotated) if there]
    others = [row for row, there in enumerate(annotated) if not there]
    labels = np.zeros((len(ids), len(classes)), np.uint8)
    labels[with_xml] = from_annotations(root, [ids[row] for row in with_xml], classes)
    if others:
        names = [ids[row] for row in others]
        missing = names
        if class_files(root):
            labels[others], missing = _main_labels(root, names, classes)
        if missing:
            raise FileNotFoundError(
                f"{root}: no image-level labels for {_some(missing)}: expected Annotations/{missing[0]}.xml "
                f"or a line in each ImageSets/Main/<class>_<split>.txt"
            )
    return labels


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

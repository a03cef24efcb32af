"""Where the files of a folder come from: each stage writes it into its folder, and the next takes it from there.

``data.yaml`` holds the data folder's settings, the splits of the run, the split whose images the files are of, and the
class names. Settings that are given to the next stage win over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from pssl.config.data import FolderConfig, SplitDataConfig, SplitsConfig
from pssl.config.mapping import changed, from_dict, overlay, to_dict
from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.ranks import is_first

FILE = "data.yaml"


@dataclass(frozen=True)
class Origin:
    """The data that a folder's files were made from.

    `split` names the split whose images the files are of; `classes` are region 1 and up.
    """

    data: SplitDataConfig = field(default_factory=SplitDataConfig)
    split: str = "train"
    classes: tuple[str, ...] = ()

    def write(self, out: Path) -> None:
        """Write OUT/data.yaml; only the first rank does. Paths are absolute: the next stage may start elsewhere."""
        if not is_first():
            return
        folder, splits = self.data.folder, self.data.splits
        folder = replace(
            folder,
            root=None if folder.root is None else folder.root.resolve(),
            classes=None if folder.classes is None else folder.classes.resolve(),
            labels=_located(folder.labels, (".csv", ".npy", ".json")),
        )
        splits = replace(
            splits,
            train_split=_located(splits.train_split, (".txt",)),
            val_split=_located(splits.val_split, (".txt",)),
        )
        values = {
            "data": to_dict(SplitDataConfig(folder, splits)),
            "split": _located(self.split, (".txt",)),
            "classes": list(self.classes),
        }
        write_text(out / FILE, yaml.safe_dump(values, sort_keys=False, width=110, allow_unicode=True))


def _located(name: str, endings: tuple[str, ...]) -> str:
    """Return a name that is a file's path as an absolute path, any other as it is."""
    return str(Path(name).resolve()) if name.lower().endswith(endings) else name


def origin_of(place: Path) -> Origin | None:
    """Return what the nearest data.yaml at or above `place` says, as far as the folder of its run; None without one."""
    for folder in (place, *place.resolve().parents[:4]):
        path = folder / FILE
        if path.is_file():
            return _read(path)
    return None


def _read(path: Path) -> Origin:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: expected a readable YAML file, got {error}") from None
    if not isinstance(values, dict) or set(values) != {"data", "split", "classes"}:
        raise InputError(f"{path}: expected the keys data, split and classes, got {values!r:.80}")
    data = from_dict(SplitDataConfig, values["data"], str(path))
    return Origin(data, str(values["split"]), tuple(map(str, values["classes"])))


def folder_from(place: Path, given: FolderConfig) -> FolderConfig:
    """Return the data folder that the files at `place` were made from, with what differs from the defaults in `given`.

    Another root is another folder: all of `given` then holds.
    """
    origin = origin_of(place)
    if origin is None or (given.root is not None and given.root.resolve() != origin.data.folder.root):
        return given
    more = {key: value for key, value in changed(given).items() if key != "root"}
    return overlay(origin.data.folder, ("data", more))


def require_classes(place: Path, classes: Sequence[str]) -> None:
    """Raise InputError where the files at `place` were made with other class names, or in another order."""
    origin = origin_of(place)
    if origin is not None and origin.classes and origin.classes != tuple(classes):
        raise InputError(
            f"{place}: made for the classes {', '.join(origin.classes)}; expected these of the data folder, got "
            f"{', '.join(classes)}"
        )


def splits_from(place: Path, given: SplitsConfig) -> SplitsConfig:
    """Return the splits of the run that made the files at `place`, with what differs from the defaults in `given`."""
    origin = origin_of(place)
    return given if origin is None else overlay(origin.data.splits, ("data", changed(given)))


def split_from(place: Path, given: str | None) -> str:
    """Return the split that is `given`, else the one whose images the files at `place` are of, else "train"."""
    origin = origin_of(place)
    return given or (origin.split if origin is not None else "train")


def same_split(first: str, second: str) -> bool:
    """Return whether two names mean one split; lists may be named relatively or absolutely."""
    return _located(first, (".txt",)) == _located(second, (".txt",))

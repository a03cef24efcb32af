"""Settings files: a folder that is filled in several runs holds what one set of settings made, and says which."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from pssl.core.errors import InputError
from pssl.core.files import write_text
from pssl.core.ranks import is_first, wait


def write_or_require_same(path: Path, settings: dict[str, Any]) -> None:
    """Write `settings` to the YAML file `path`; where it is there already, require it to say the same.

    Raises InputError, naming the file and the settings that differ, where it says something else: what lies beside it
    was made otherwise, and must not be mixed with what is made now.
    """
    require_same(path, settings)
    wait()
    if is_first() and not path.is_file():
        write_text(path, yaml.safe_dump(settings, sort_keys=False, width=110))
    wait()


def require_same(path: Path, settings: dict[str, Any], but: Collection[str] = ()) -> None:
    """Raise InputError, as :func:`write_or_require_same` does, if the file is there and differs from `settings`.

    `but` are dotted names of settings and sections that may.
    """
    if not path.is_file():
        return
    there = yaml.safe_load(path.read_text(encoding="utf-8"))
    differing = _differences(there if isinstance(there, dict) else {}, settings, but)
    if differing:
        raise InputError(
            f"{path.parent}: expected what these settings made, got what others did, which differ in "
            f"{', '.join(differing[:5])}; name another folder, or remove this one"
        )


def _differences(there: dict, here: dict, but: Collection[str], prefix: str = "") -> list[str]:
    """Return the dotted names of what differs, with both values."""
    found = []
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if f"{prefix}{key}" in but:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, but, f"{prefix}{key}.")
        elif old != new or (key in there) != (key in here):
            found.append(f"{prefix}{key} ({old!r}, now {new!r})")
    return found

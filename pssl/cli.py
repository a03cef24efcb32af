"""From YAML files and flags to a typed configuration, and back.

Order, later wins: field defaults, recipes (only for configurations whose `recipes` names some: section to file, ""
being the whole), ``--config FILE.yaml``, flags.
A key that no field has is an error that names the nearest one.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import typing
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import tyro
import yaml
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pssl.config.mapping import ConfigError, overlay

T = TypeVar("T")
RECIPES = Path(__file__).parent / "recipes"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-3, which YAML 1.1 reads as a text


NOTES = (
    '--config FILE.yaml sets values before flags do, by the same names: "data: {root: VOC2012}". It may be given '
    "several times, and a run's own config.yaml is one.",
    '"Paper": Yoon et al., arXiv 2112.05351. "Measured": chosen on the training images of the data named.',
)

_SECTIONS = ConstructorRegistry()


@_SECTIONS.struct_rule
def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass as tyro reads it, but for its fields' texts, which tyro would break where the source does."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    fields = (
        StructFieldSpec(
            item.name,
            hints[item.name],
            getattr(info.default, item.name),
            partial(lambda name: field_texts(info.type).get(name), item.name),
        )
        for item in dataclasses.fields(info.type)
    )
    return StructConstructorSpec(info.type, tuple(fields))


@cache
def field_texts(kind: type) -> dict[str, str]:
    """What the docstring after each field of a dataclass says, as one line."""
    texts = {}
    for part in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        for entry, after in itertools.pairwise(body):
            if isinstance(entry, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[entry.target.id] = " ".join(ast.literal_eval(after.value).split())
    return texts


def _command_line(kind: type[T], prog: str | None, flags: list[str], default: T) -> T:
    columns = min(shutil.get_terminal_size().columns, 110)
    # lines that begin with a blank are left as they are
    notes = [textwrap.fill(note, columns, subsequent_indent="  ") for note in NOTES]
    text = "\n".join([textwrap.fill(" ".join((kind.__doc__ or "").split()), columns), *notes])
    return tyro.cli(kind, prog=prog, description=text, args=flags, default=default, registry=_SECTIONS)


def parse(kind: type[T], argv: list[str] | None = None, prog: str | None = None) -> T:
    """The configuration that `argv` (default: the command line) describes; exits with a message if it is wrong.

    `prog` is the command's name in its help, as in "python -m pssl.train".
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        files, flags = _take_config_files(argv)
        base = overlay(kind(), *[_read(path) for path in files])
        if hasattr(base, "recipes"):
            helpless = [
                flag for flag in flags if flag not in ("-h", "--help")
            ]  # which shows the recipe's values
            chosen = _command_line(kind, prog, helpless, base).recipes
            recipes = [_within(section, *_read(_recipe_path(name))) for section, name in chosen.items()]
            named = [
                _within(section, name, {"recipe": name.rpartition("/")[2]})
                for section, name in chosen.items()
            ]
            base = overlay(kind(), *recipes, *[_read(path) for path in files], *named)
            for section in chosen:
                flags = _without(flags, f"--{section}.recipe" if section else "--recipe")
        return _command_line(kind, prog, flags, base)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"recipe: expected one of {', '.join(known)}, got {path.stem!r}")
    return path


def _within(section: str, source: str, values: dict) -> tuple[str, dict]:
    """A source whose values are those of a section of the configuration ("": the whole)."""
    return source, {section: values} if section else values


def _take_config_files(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Split ``--config FILE`` (or ``--config=FILE``) off the other flags."""
    files, rest = [], []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] or next(words, None)
            if value is None:
                raise ConfigError("--config: expected a YAML file, got nothing")
            files.append(Path(value))
        else:
            rest.append(word)
    return files, rest


def _without(argv: list[str], flag: str) -> list[str]:
    """`argv` without `flag` and its value."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == flag:
            skip = True
        elif not word.startswith(flag + "="):
            kept.append(word)
    return kept


def _read(path: Path) -> tuple[str, dict]:
    """A YAML file's mapping, with its name for messages."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a readable YAML file, got {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return str(path), values

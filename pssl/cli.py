"""Commands: from flags and YAML files to a typed configuration, and from that to a run.

A value comes from, later wins: field defaults, recipes (only for configurations whose `recipes` names some: section to
file, "" being the whole), ``--config FILE.yaml``, flags. :class:`Command` is the frame in which every command runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import tyro
import yaml

from pssl.config.mapping import ConfigError, overlay, setting
from pssl.core.errors import InputError, MissingPackage

C = TypeVar("C")
R = TypeVar("R")
RECIPES = Path(__file__).parent / "recipes"
NOTES = (
    '--config FILE.yaml sets values before flags do, by the same names: "data: {root: VOC2012}". It may be given '
    "several times, and a run's own config.yaml is one.",
    '"Paper": Yoon et al., arXiv 2112.05351. "Measured": chosen on the training images of the data named.',
)
MENDABLE = (InputError, MissingPackage, OSError, FloatingPointError)
"""Errors that a command ends in one line: what a person gave or lacks, files and disks, a training that diverged."""


class Command(Generic[C, R]):
    """A job with a configuration, as a function and as a command; made by :func:`command`.

    Called from Python, ``run(config, log=None)`` joins the ranks that torchrun announces, sets threads and determinism
    for as long as it runs, and raises what goes wrong. :meth:`main` is the same for a terminal: what a person can mend
    is one line ``error: ...`` and exit status 2; a traceback means a fault of ours, or ``PSSL_DEBUG=1``.
    """

    def __init__(self, name: str, config: type[C], job: Callable[[C, Any], R]) -> None:
        self.name = name
        self.config = config
        self.job = job
        self.__doc__ = job.__doc__
        self.__wrapped__ = job

    def __call__(self, config: C, log: Any = None) -> R:
        """Run the job; `log` (:class:`pssl.core.log.Log`) takes what it says, by default the terminal."""
        from pssl.core.log import Log

        with _frame(config):
            return self.job(config, log or Log())

    def main(self, argv: list[str] | None = None) -> R:
        """Run the job as `argv` (default: the command line) describes it, and return what it returns."""
        from pssl.core import ranks

        try:
            return self(parse(self.config, argv, f"python -m {self.name}"))
        except BrokenPipeError:  # who reads the output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except MENDABLE as error:
            if os.environ.get("PSSL_DEBUG") == "1":
                raise
            _end(error)
        finally:
            ranks.stop()


def command(name: str, config: type[C]) -> Callable[[Callable[[C, Any], R]], Command[C, R]]:
    """Make a :class:`Command` of the function below: ``@command("pssl.cams", CamsConfig)`` of ``run(config, log)``."""
    return lambda job: Command(name, config, job)


@contextlib.contextmanager
def _frame(config: Any) -> Iterator[None]:
    """Ranks, threads and determinism of a job; what was set before is set again afterwards, but for the ranks."""
    import torch

    from pssl.core import ranks
    from pssl.core.device import resolve_device

    device = resolve_device(setting(config, "device") or "cpu")
    if device.type == "cuda":  # what collective calls without a tensor go by
        torch.cuda.set_device(device)
    ranks.start(device)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        if setting(config, "threads") is not None:
            torch.set_num_threads(setting(config, "threads"))
        torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _end(error: BaseException) -> NoReturn:
    """End the process with the error in one line; a rank but the first says which it is."""
    from pssl.core import ranks

    who = f" (rank {ranks.rank()})" if ranks.rank() else ""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"error{who}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def parse(kind: type[C], argv: list[str] | None = None, prog: str | None = None) -> C:
    """Return the configuration that `argv` (default: the command line) describes; InputError says what is wrong in it.

    `prog` is the command's name in its help, as in "python -m pssl.train".
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    files, flags = _take_config_files(argv)
    base = overlay(kind(), *[_read(path) for path in files])
    if hasattr(base, "recipes"):
        quiet = [flag for flag in flags if flag not in ("-h", "--help")]  # help shows the recipe's values
        chosen = _command_line(kind, prog, quiet, base).recipes
        recipes = [_within(section, *_read(_recipe_path(name))) for section, name in chosen.items()]
        named = [
            _within(section, name, {"recipe": name.rpartition("/")[2]}) for section, name in chosen.items()
        ]
        base = overlay(kind(), *recipes, *[_read(path) for path in files], *named)
        for section in chosen:
            flags = _without(flags, f"--{section}.recipe" if section else "--recipe")
    return _command_line(kind, prog, flags, base)


def _command_line(kind: type[C], prog: str | None, flags: list[str], default: C) -> C:
    columns = min(shutil.get_terminal_size().columns, 110)
    # lines that begin with a blank are left as they are
    notes = [textwrap.fill(note, columns, subsequent_indent="  ") for note in NOTES]
    text = "\n".join([textwrap.fill(" ".join((kind.__doc__ or "").split()), columns), *notes])
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, prog=prog, description=text, args=flags, default=default)
    except SystemExit as end:
        refused = _cause(end)
        if refused is not None:  # one of our own checks, which tyro would set in a frame
            raise refused from None
        print(shown.getvalue(), end="", file=sys.stderr)
        raise


def _cause(error: BaseException) -> InputError | None:
    """Return the InputError during whose handling `error` was raised, if any."""
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, InputError):
            return error
    return None


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"recipe: expected one of {', '.join(known)}, got {path.stem!r}")
    return path


def _within(section: str, source: str, values: dict) -> tuple[str, dict]:
    """Return a source whose values are those of a section of the configuration ("": the whole)."""
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
    """Return `argv` without `flag` and its value."""
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
    """Return a YAML file's mapping, with its name for messages."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a readable YAML file, got {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return str(path), values

"""Imports go one way: from the commands down to pssl_ext. A room may use its own modules and the rooms before it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = (
    "pssl_ext",
    "pssl.core",
    "pssl.config",
    "pssl.cli",
    "pssl.data",
    "pssl.models",
    "pssl.inputs",
    "pssl.method",
    "pssl.config.train",  # has a section for every term of the method
    "pssl.scoring",
    "pssl.training",
    "pssl.reporting",
    "commands",
)
"""Each room with those before it within reach; pssl.cli is for commands alone."""


def room_of(module: str) -> str:
    """The longest name among ROOMS that the module's begins with; else it is a command."""
    if module.split(".")[-1] == "__main__":
        return "commands"
    found = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return max(found, key=len) if found else "commands"


def imports_of(module: str, text: str, is_package: bool = False):
    """(line, imported module) of every import, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package else -1]
            start = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [start, node.module]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward(module: str, text: str, is_package: bool = False) -> list[str]:
    """The imports of a module that its room may not have."""
    own, found = ROOMS.index(room_of(module)), []
    for line, name in imports_of(module, text, is_package):
        if name.split(".")[0] not in ("pssl", "pssl_ext") or name == "pssl":
            continue
        other = room_of(name)
        if ROOMS.index(other) > own or (
            other == "pssl.cli" and room_of(module) not in ("pssl.cli", "commands")
        ):
            found.append(f"{module}, line {line}: {name}")
    return found


@pytest.mark.parametrize("package", ["pssl", "pssl_ext"])
def test_imports_go_one_way(package):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert len(files) > 15
    wrong = []
    for path in files:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        is_package = path.name == "__init__.py"
        wrong += upward(module.removesuffix(".__init__"), path.read_text(encoding="utf-8"), is_package)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "text", "is_upward"),
    [
        ("pssl.core.log", "from pssl.data import VOCFolder", True),
        ("pssl.data.voc", "def f():\n    from pssl.models import backbones", True),
        ("pssl.data.voc", "from .palette import voc_palette", False),
        ("pssl.models.deeplab", "from pssl.data.transforms import to_float", False),
        ("pssl.method.terms.rcm", "from pssl.config.train import TrainConfig", True),
        ("pssl.training.arms", "from pssl.config.train import TrainConfig", False),
        ("pssl.training.arms", "from pssl.train import run", True),
        ("pssl.inputs.build", "from pssl.cli import command", True),
        ("pssl.data.__main__", "from pssl.cli import command", False),
        ("pssl_ext.op", "import pssl.core.files", True),
    ],
)
def test_an_upward_import_is_found(module, text, is_upward):
    assert bool(upward(module, text)) == is_upward

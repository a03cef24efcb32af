"""The modules of pssl_ext import one another in one direction, inside functions too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pssl_ext

ROOT = Path(pssl_ext.__file__).parent


def imports() -> dict[str, set[str]]:
    """Each module of the package with those that it names in an import."""
    modules = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                named |= inner or {node.module}
        found[name] = named & modules.keys()
    return found


def test_no_circle():
    found = imports()
    assert found["pssl_ext.op"] and found["pssl_ext"]
    list(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle


def test_choosing_a_backend_knows_no_table_of_operators():
    assert imports()["pssl_ext.dispatch"] == {"pssl_ext.torch_private"}

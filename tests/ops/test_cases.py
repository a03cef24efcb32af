"""Every operator has its file in cases/, whole, and no file is of an operator that is none."""

import ast
import inspect
from pathlib import Path

import cases
import pytest
import torch
from cases import PARTS, case_of
from support import Fault

from pssl_ext.op import OPS
from pssl_ext.testing import samples

pytestmark = pytest.mark.interface

FOLDER = Path(cases.__file__).parent


def test_a_file_for_each_operator():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_a_file_is_whole(op):
    case = case_of(op)
    missing = [part for part in PARTS if not hasattr(case, part)]
    assert not missing, f"tests/ops/cases/{op}.py lacks {', '.join(missing)}"
    assert case.BAD_CALLS and callable(case.training_size)
    assert case.FAULTS and all(isinstance(fault, Fault) and fault.samples for fault in case.FAULTS)
    signature = inspect.signature(OPS[op].function)
    for unsound, _ in [({}, ""), *case.BAD_CALLS]:
        signature.bind(**{**case.SOUND, **unsound})
    known = {s.id for s in samples(op, "cpu", torch.float32, "contiguous")}
    assert (case.GRADIENT_SAMPLE is None) == (not OPS[op].differentiable)
    named = {s for fault in case.FAULTS for s in (*fault.samples, *fault.unseen)}
    named |= {case.GRADIENT_SAMPLE} - {None}
    assert named <= known, f"{op} has no sample {', '.join(named - known)}"


@pytest.mark.parametrize("op", OPS)
def test_a_file_tests_the_reference_against_something_else(op):
    """At least one of its tests calls the reference."""
    tree = ast.parse((FOLDER / f"{op}.py").read_text(encoding="utf-8"))
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert any("reference" in ast.unparse(n) or "BACKENDS" in ast.unparse(n) for n in tests)

"""Makes the cases: a test that takes ``case`` runs for every operator of the registry, so a new one is
tested at once.

``@pytest.mark.cases(dtypes=…, layouts=…, pairwise=True, differentiable=True, count=n)`` narrows them. A backend
that cannot run gives one skipped test for each operator and device, with the reason.
"""

from itertools import product

import pytest
import torch
from pairs import pairwise as pairs
from support import schema_args

import pssl_ext  # noqa: F401  fills the registry
from pssl_ext import dispatch
from pssl_ext.op import OPS
from pssl_ext.testing import LAYOUTS, Case, devices, samples


def pytest_configure(config):
    config.addinivalue_line("markers", "cases(**choices): which cases of the operators a test runs for")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("cases")
        choices = dict(marker.kwargs if marker else {})
        if metafunc.config.getoption("whole") and choices.pop("pairwise", False):
            choices["layouts"] = [name for name in LAYOUTS if name != "contiguous"]
        metafunc.parametrize("case", list(_cases(**choices)))


def _cases(
    dtypes=(torch.float32,),
    layouts=("contiguous",),
    pairwise=False,
    differentiable=False,
    count=None,
    each=None,
):
    """``pairwise``: not every layout in every type, see ``pairs``; ``count``: the operator's first samples only;
    ``each(case)``: those it accepts."""
    for op, device in product(OPS, devices()):
        if differentiable and not OPS[op].differentiable:
            continue
        for backend, reason in _backends(op, device):
            if reason is not None:
                skip = pytest.mark.skip(reason=f"{backend} on {device}: {reason}")
                yield pytest.param(None, marks=skip, id=f"{op}-{backend}-{device}")
                continue
            ids = [s.id for s in samples(op, device, torch.float32, "contiguous")][:count]
            for dtype in dtypes:
                reason = _refusal(op, backend, device, dtype)
                if reason is not None:
                    skip = pytest.mark.skip(reason=f"{backend} on {device}: {reason}")
                    yield pytest.param(None, marks=skip, id=f"{op}-{backend}-{device}-{dtype}")
                    continue
                chosen = pairs(op, device, dtypes)[dtype] if pairwise else product(ids, layouts)
                for sample_id, layout in chosen:
                    case = Case(op, sample_id, backend, device, dtype, layout)
                    if each is None or each(case):
                        yield pytest.param(case, id=str(case))


def _refusal(op, backend, device, dtype):
    """Why ``backend``, which runs, does not for ``dtype``: that is the case of Triton and float64."""
    if backend != "triton" or dtype != torch.float64:
        return None
    args = schema_args(Case(op, samples(op, device, dtype, "contiguous")[0].id, device=device, dtype=dtype))
    reason = dispatch.why_not(OPS[op], backend, device, OPS[op].arguments(*args))
    assert reason, "a type that Triton takes is to be tested"
    return reason


def _backends(op, device):
    """Each backend with the reason it cannot run. "auto" stands for the operator's composite kernel where
    there is no compiled one, and is the same as "native" where there is."""
    native = dispatch.why_not(OPS[op], "native", device)
    yield "native", native
    if native is not None:
        yield "auto", None
    yield "triton", dispatch.why_not(OPS[op], "triton", device)

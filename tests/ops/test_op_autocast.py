"""Autocast changes nothing: inputs are taken as they are, results stay float32."""

import pytest
import torch

from pssl_ext.testing import run

pytestmark = pytest.mark.interface


@pytest.mark.cases(dtypes=(torch.float32, torch.bfloat16))
def test_autocast(case):
    args = case.sample.args
    plain = run(case.spec, args, case.backend).named()
    with torch.autocast(case.device, dtype=torch.bfloat16):
        cast = run(case.spec, args, case.backend).named()
    for name, tensor in plain.items():
        assert cast[name].dtype == tensor.dtype, f"{case}: {name}"
        assert torch.equal(cast[name], tensor), f"{case}: {name} differs under autocast"


@pytest.mark.cases()
def test_results_are_not_half(case):
    """Losses and prototypes are float32 (float64 for float64 inputs), masks and counts integers."""
    for output in run(case.spec, case.sample.args, case.backend).outputs:
        assert output.dtype not in (torch.bfloat16, torch.float16)

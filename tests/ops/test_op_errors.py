"""The words of every check: operator, argument, what was expected and what came."""

import re

import pytest
import torch
from cases import case_of
from small_inputs import FEATURES, LABELS

from pssl_ext.op import OPS

pytestmark = pytest.mark.interface

CALLS = [
    pytest.param(op, unsound, words, id=f"{op}-{'-'.join(unsound)}-{i}")
    for op in OPS
    for i, (unsound, words) in enumerate(case_of(op).BAD_CALLS)
]
LABELLED = [op for op in OPS if "regions" in case_of(op).SOUND]


@pytest.mark.parametrize("op, unsound, words", CALLS)
def test_words(op, unsound, words):
    """Values (labels) are looked at by the kernel, whose C++ can only raise RuntimeError."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        OPS[op].function(**{**case_of(op).SOUND, **unsound})
    if " hold " in words:
        assert f"{op}: {words}" in str(error.value)
    else:
        assert error.type in (ValueError, TypeError)
        assert str(error.value) == f"{op}: {words}"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("op", LABELLED)
def test_a_label_out_of_range_is_never_a_crash(op, dtype):
    """The ends of every integer type, forward and with a gradient asked for."""
    for label in {3, torch.iinfo(dtype).max - 1, torch.iinfo(dtype).min} - {0}:
        regions = LABELS.to(dtype).clone()
        regions[1, 2, 3] = label
        features = FEATURES.clone().requires_grad_()
        with pytest.raises(
            (ValueError, RuntimeError), match=re.escape(f"or ignore_index=255, got [{label}]")
        ):
            OPS[op].function(**dict(case_of(op).SOUND, features=features, regions=regions))


@pytest.mark.parametrize("op", OPS)
def test_the_sound_arguments_are_sound(op):
    OPS[op].function(**case_of(op).SOUND)

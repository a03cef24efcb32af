"""The module forms: the operators' own arguments and defaults, and what a module adds."""

import copy
import inspect
import pickle
import pydoc

import pytest
import torch
from cases import case_of

from pssl_ext import nn as pssl_nn
from pssl_ext.op import OPS
from pssl_ext.testing import samples

pytestmark = pytest.mark.interface

MODULES = {op: case_of(op).MODULE for op in OPS if case_of(op).MODULE is not None}


def test_every_module_is_of_an_operator():
    assert {name for name in pssl_nn.__all__} == {module.__name__ for module in MODULES.values()}


@pytest.mark.parametrize("op", MODULES)
def test_same_arguments_and_results(op):
    """Constructor and forward share out the operator's arguments, names and defaults unchanged."""
    function, module = OPS[op].function, MODULES[op]
    own = inspect.signature(function).parameters
    constructor = inspect.signature(module).parameters
    forward = {n: p for n, p in inspect.signature(module.forward).parameters.items() if n != "self"}
    assert set(constructor) | set(forward) == set(own) and not set(constructor) & set(forward)
    for name, parameter in {**constructor, **forward}.items():
        assert (parameter.default, parameter.annotation) == (own[name].default, own[name].annotation), name
    for sample in samples(op, "cpu", torch.float32, "contiguous"):
        made = module(**{n: v for n, v in sample.args.items() if n in constructor})
        got = made(**{n: v for n, v in sample.args.items() if n in forward})
        torch.testing.assert_close(got, function(**sample.args), rtol=0, atol=0)


def test_repr():
    assert repr(pssl_nn.CamRegions(foreground=0.6, background=0.4)) == (
        "CamRegions(foreground=0.6, background=0.4, ignore_index=255, backend='auto')"
    )
    loss = pssl_nn.PrototypeContrast(temperature=torch.nn.Parameter(torch.tensor(0.25)))
    assert "temperature=0.25, ignore_index=255" in repr(loss)


def test_the_temperature_is_learned_or_a_buffer():
    args = (torch.randn(1, 4, 3, 3), torch.randn(2, 4), torch.randint(0, 2, (1, 6, 6)))
    learned = pssl_nn.PrototypeContrast(temperature=torch.nn.Parameter(torch.tensor(0.25)))
    learned(*args).backward()
    assert [n for n, _ in learned.named_parameters()] == ["temperature"] and bool(learned.temperature.grad)
    fixed = pssl_nn.PrototypeContrast(temperature=torch.tensor(0.25))
    assert list(fixed.state_dict()) == ["temperature"] and not list(fixed.parameters())


@pytest.mark.parametrize("op", MODULES)
def test_copies(op):
    made = MODULES[op](2) if op == "prototype_pool" else MODULES[op]()
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(copied) is MODULES[op]
        assert repr(copied) == repr(made) and copied.settings() == made.settings()


@pytest.mark.parametrize("op", MODULES)
def test_help(op):
    """The class's own name, arguments and words, which are the function's."""
    text = pydoc.plain(pydoc.render_doc(MODULES[op]))
    function = OPS[op].function
    assert f"{MODULES[op].__name__}{inspect.signature(MODULES[op])}" in text
    assert inspect.getdoc(function) in inspect.getdoc(MODULES[op])
    assert f"forward{inspect.signature(MODULES[op].forward)}" in text


def test_settings_are_checked_by_name():
    message = r"CamCompare: got an unexpected keyword argument 'temperature'; its settings are attention, .*"
    with pytest.raises(TypeError, match=message):
        pssl_nn.CamCompare(temperature=1.0)
    with pytest.raises(TypeError, match="PrototypePool: missing a required argument: 'num_regions'"):
        pssl_nn.PrototypePool()
    args = (torch.randn(1, 4, 3, 3), torch.randint(0, 2, (1, 6, 6)))
    with pytest.raises(TypeError, match="num_regions"):
        pssl_nn.PrototypePool(2)(*args, 3)


def test_a_list_is_copied():
    dilations = [1, 2]
    module = pssl_nn.PixelRefine(dilations=dilations)
    dilations.append(4)
    assert module.dilations == (1, 2)

"""Without private names of torch's: hidden from pssl_ext, in a process of its own, where the operators give the same
results and gradients, compile in one graph and pass opcheck."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from new_python import in_new_python

from pssl_ext import torch_private

FILE = Path(torch_private.__file__)
SOURCE = FILE.read_text(encoding="utf-8")
#: the names that are looked up together: without one of them all are done without
GROUPS = {
    group: re.findall(r'"(\w+)"', names)
    for group, names in re.findall(r"^(_[A-Z_]+) = _find\(([^)]*)\)", SOURCE, re.M)
}

CHECKS = """
import importlib.machinery
import importlib.util
import os
import sys

import torch

NAMES, GROUP, FILE = os.environ["NAMES"].split(), os.environ["GROUP"], os.environ["FILE"]


class Loader(importlib.machinery.SourceFileLoader):
    '''Hides the names while the module looks for them; torch itself needs some.'''

    def exec_module(self, module):
        found = {name: getattr(torch._C, name) for name in NAMES}
        for name in NAMES:
            delattr(torch._C, name)
        super().exec_module(module)
        for name, value in found.items():
            setattr(torch._C, name, value)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pssl_ext.torch_private":
            return importlib.util.spec_from_file_location(name, FILE, loader=Loader(name, FILE))


sys.meta_path.insert(0, Finder)
from pssl_ext import torch_private

assert getattr(torch_private, GROUP) is None

from support import planted, schema_args
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from pssl_ext import fallback, prototype_contrast
from pssl_ext.op import OPS
from pssl_ext.testing import Case, check

# one grid, where the native kernels save products; lists of tensors; no gradient
for op, sample in (
    ("prototype_contrast", "same_grid_saved_weighted"), ("cam_compare", "sum"), ("cam_sweep", "one_image")
):
    for backend in ("auto", "reference"):
        case = Case(op, sample, backend)
        check(case)
        check(case, function=torch.compile(case.spec.function, fullgraph=True, backend="aot_eager"))
    torch.library.opcheck(case.spec.op, schema_args(case, requires_grad=True))

# transforms see the dispatcher's operators
labels = torch.arange(72).reshape(2, 6, 6) % 3
features, prototypes = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(3, 8)
loss = lambda x: prototype_contrast(x, prototypes, labels)
os.environ["PSSL_DEBUG"] = "1"  # values are looked at, which those of a graph have none of
graph = make_fx(lambda x: torch.autograd.grad(loss(x), x)[0])(features).graph
called = [str(node.target) for node in graph.nodes if "pssl" in str(node.target)]
assert called == ["pssl.prototype_contrast.default", "pssl.prototype_contrast_backward.default"], called
del os.environ["PSSL_DEBUG"]
losses = torch.func.vmap(loss)(features[None])
for a, b in ((losses, loss(features)[None]), [torch.autograd.grad(x, features)[0] for x in (losses, loss(features))]):
    assert torch.equal(a, b)

# the reference's gradient as a kernel, which devices without another one take
case = Case("prototype_contrast", "same_grid")
kernel = fallback.backward(case.spec.reference, case.spec.output_count, case.spec.differentiable_indices)
with planted("prototype_contrast_backward", kernel):
    check(case)
    with FlopCounterMode(display=False):
        check(case)

assert torch_private.has_kernel("prototype_pool", "cpu") == ("pssl_ext._C" in sys.modules)
assert not torch_private.has_kernel("prototype_pool", "meta")
"""


def test_private_names_stand_in_one_file():
    assert sum(map(len, GROUPS.values())) == 11
    for path in FILE.parent.rglob("*.py"):
        if path != FILE:
            assert "torch._C" not in path.read_text(encoding="utf-8"), f"{path}: torch._C"
    assert not re.findall(r"torch\._C\.\w+", SOURCE), "a name without a fallback"


@pytest.mark.parametrize("group, name", [(group, name) for group in GROUPS for name in GROUPS[group]])
def test_without_one_name_its_fallback_is_taken(group, name, monkeypatch):
    monkeypatch.delattr(torch._C, name)
    spec = importlib.util.spec_from_file_location("without", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [g for g in GROUPS if getattr(module, g) is None] == [group]


@pytest.mark.parametrize("group", GROUPS)
def test_operators_without(group):
    ops, package = str(Path(__file__).parent), str(FILE.parent.parent)
    path = os.pathsep.join([ops, package, *filter(None, [os.environ.get("PYTHONPATH")])])
    names = " ".join(GROUPS[group])
    done = in_new_python(CHECKS, NAMES=names, GROUP=group, FILE=str(FILE), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_autograd_in_a_thread():
    """With the error of what runs in it, and its own settings untouched."""
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        (grad,) = torch_private._in_thread(lambda: torch.autograd.grad((x * x).sum(), x))
        with pytest.raises(ZeroDivisionError):
            torch_private._in_thread(lambda: 1 / 0)
    assert torch.equal(grad, 2 * x.detach())


def test_any_requires_grad_by_public_names():
    plain, wanted = torch.ones(1), torch.ones(1, requires_grad=True)
    for args in ((), (plain, 3, None), ([plain], (2, 4)), (wanted,), ([plain, wanted], 1.0)):
        assert torch_private._any_requires_grad(*args) == torch._C._any_requires_grad(*args)

"""A pytest plugin: runs the operators' own tests over the Triton kernels, in Triton's interpreter.

    pytest -p triton_on_cpu tests/ops

with tests/triton on PYTHONPATH. Cases of other backends are left out. TRITON_INTERPRET has to be set before the first
kernel is defined, hence a process of its own. Four things of the interpreter are mended: it multiplies bfloat16
matrices by their raw bits, cuts float32 to bfloat16 where GPUs round, reads and writes wherever a pointer leads, and in
Triton 3.6 makes numbers of arrays of one element, which numpy refuses since 2.4.
"""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


class OutOfBounds(RuntimeError):
    """A lane that is not masked out reads or writes outside of the launch's tensors."""


def mend_bfloat16(interpreter) -> None:
    import numpy as np
    import triton.language as tl

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        bits = values.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)

    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def _convert_float(values, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return rounded(values)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(values)
        return convert(values, source, target, rounding_mode)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            product = np.matmul(widened(a.data), widened(b.data)).astype(d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)
        return multiply(self, a, b, d, *rest)

    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def mend_index(interpreter) -> None:
    patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor


def check_bounds(interpreter) -> None:
    import numpy as np
    import torch
    from torch.utils._pytree import tree_leaves

    access = interpreter._interpreter
    regions: list[tuple[int, int]] = []  # of memory, [begin, end), of the tensors of the launch

    def check(what: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        active = np.broadcast_to(np.asarray(mask, bool), np.shape(pointers)).ravel()
        at = np.asarray(pointers, np.uint64).ravel()[active]
        if not at.size:
            return
        first, last = int(at.min()), int(at.max()) + size
        if any(begin <= first and last <= end for begin, end in regions):
            return
        inside = np.zeros(at.shape, bool)
        for begin, end in regions:
            inside |= (at >= begin) & (at + np.uint64(size) <= end)
        if not inside.all():
            raise OutOfBounds(f"{what}: {int((~inside).sum())} of {at.size} lanes are out of bounds")

    class Checked:
        def __getattr__(self, name):
            return getattr(access, name)

        def load(self, pointers, mask, other, dtype):
            check("load", pointers, mask, np.dtype(dtype).itemsize)
            return access.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            check("store", pointers, mask, value.dtype.itemsize)
            return access.store(pointers, value, mask)

    unchecked = interpreter.GridExecutor._init_args_hst

    def _init_args_hst(self, *given):
        made = unchecked(self, *given)
        storages = [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        regions[:] = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}
        return made

    interpreter._interpreter = Checked()
    interpreter.GridExecutor._init_args_hst = _init_args_hst


def patch_once(interpreter) -> None:
    """The interpreter exchanges the functions of triton.language at every call of a kernel's function and puts them
    back after it, which takes half of the time. Here nothing else wants them, so the first exchange stays."""
    exchange, done = interpreter._patch_lang, set()

    class Stays:
        def restore(self) -> None:
            pass

    def _patch_lang(fn):
        names = frozenset(n for n in ("tl", "core") if n in fn.__globals__)
        if names not in done:
            done.add(names)
            exchange(fn)
        return Stays()

    interpreter._patch_lang = _patch_lang


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    from triton.runtime import interpreter

    mend_bfloat16(interpreter)
    mend_index(interpreter)
    check_bounds(interpreter)
    patch_once(interpreter)


# Samples for every test; of the others test_every_dtype takes two types, and one of those that are large for an
# interpreter.
FEW = ("same_grid", "smaller_labels", "empty_batch", "smaller_size")
LARGE = ("label_grid_8x", "many_regions", "many_classes", "wide", "multi_scale")


def chosen(item) -> bool:
    if "interpreted.py" in item.nodeid:
        return True
    if "-triton-" not in item.nodeid:
        return False
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if case is None or case.sample_id in FEW:
        return True
    if "test_every_dtype" not in item.nodeid or (case.op, case.sample_id) == ("cam_compare", "wide"):
        return False
    return str(case.dtype) in (
        ("torch.float32",) if case.sample_id in LARGE else ("torch.float32", "torch.bfloat16")
    )


def pytest_collection_modifyitems(config, items):
    """Triton's cases, and the tests of this folder."""
    from emulation import of_a_kernel

    taken = set()
    kept = [item for item in items if chosen(item) and (config.option.whole or of_a_kernel(item, taken))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept

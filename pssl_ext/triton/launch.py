"""How kernels are called, and how tensors come to them: as tuples of the tensor and its strides."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pssl_ext.dispatch import TRITON_MOST

#: The classes that a tile holds, for up to as many classes: a tile holds all of them, since a softmax needs them
#: together, and three sizes serve VOC (21), COCO (81) and COCO-Stuff (171) without a compilation for each number.
CLASS_BLOCKS = (32, 128, TRITON_MOST["regions"])


def class_block(classes: int) -> int:
    return next(block for block in CLASS_BLOCKS if classes <= block)


def launch(kernel: Any, programs: int, *args: Any, warps: int, stages: int = 2, **constants: Any) -> None:
    """Runs ``kernel`` in ``programs`` programs, along one axis, on the device of the tensors among ``args``."""
    if programs == 0:
        return
    device = next(a.device for a in tree_leaves(args) if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, num_warps=warps, num_stages=stages, **constants)


def view(tensor: Tensor | None) -> tuple | None:
    """A tensor as a kernel takes it: with its strides in elements."""
    return None if tensor is None else (tensor, *tensor.stride())


def bundle(*values: Any) -> tuple:
    """Tuples and others as one argument of a kernel, which takes them with one more at the end. Triton 3.6 puts
    constants, a stride of 1 among them, into inner tuples without telling the outer one's type, from which loops make
    it anew; a constant of the outer one's own, behind them, has the type taken again."""
    return (*values, None)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Features:
    """A map [B,D,h,w] in any layout."""

    tensor: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return tuple(self.tensor.shape)

    @property
    def cells(self) -> int:
        return self.tensor.shape[2] * self.tensor.shape[3]

    @property
    def flat(self) -> bool:
        """Whether the cells of an image lie at one distance, row after row."""
        _, _, h, w = self.tensor.shape
        _, _, sy, sx = self.tensor.stride()
        return h <= 1 or sy == w * sx

    @property
    def view(self) -> tuple:
        return view(self.tensor)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.tensor.new_empty(shape, dtype=dtype)


def gradient_of(argument: Tensor | None, needed: bool) -> Tensor:
    """Room for a gradient in the layout of its argument; an empty tensor where none is wanted."""
    if argument is None:
        return torch.empty(0)
    return torch.empty_like(argument) if needed else argument.new_empty(0)

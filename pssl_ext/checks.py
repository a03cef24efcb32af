"""Argument checks that every operator shares.

An error names the operator, the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require(ok: bool, op: str, argument: str, expected: str | Callable[[], str], got: Any) -> None:
    """Raises ValueError ``<op>: <argument> must be <expected>, got <got>`` unless ``ok``.

    An ``expected`` that holds sizes is a function: formatting a size while ``torch.compile`` traces would make it a
    constant of the graph, which is then compiled anew for every batch size.
    """
    if not ok:
        expected = expected if isinstance(expected, str) else expected()
        raise ValueError(f"{op}: {argument} must be {expected}, got {_describe(got)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    return repr(value) if isinstance(value, str) else str(value)


def require_tensor(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")


def require_floating(op: str, argument: str, value: Tensor) -> None:
    require_tensor(op, argument, value)
    if value.dtype not in FLOATING:
        require(False, op, argument, "float16, bfloat16, float32 or float64", value.dtype)


def require_integer(op: str, argument: str, value: Tensor) -> None:
    require_tensor(op, argument, value)
    if value.dtype not in INTEGER:
        require(False, op, argument, "of an integer type", value.dtype)


def require_device(op: str, argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        require(False, op, argument, f"on {device} as the first argument", value)


def require_size(op: str, argument: str, value: Any) -> None:
    ok = isinstance(value, (tuple, list)) and len(value) == 2
    ok = ok and all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 1 for n in value)
    require(ok, op, argument, "(H,W), two integers of at least 1", value)


def check_regions(op: str, regions: Tensor, num_regions: int, ignore_index: int) -> None:
    """Raises ValueError if a label is neither in 0..num_regions-1 nor ``ignore_index``. Reads the data."""
    bad = (regions != ignore_index) & ((regions < 0) | (regions >= num_regions))
    if bool(bad.any()):
        values = torch.unique(regions[bad])[:5].tolist()
        raise ValueError(
            f"{op}: regions must hold labels 0..{num_regions - 1} or ignore_index={ignore_index}, got {values}"
        )

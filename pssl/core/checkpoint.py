"""Checkpoints: weights as safetensors with a description, training state as tensors and plain values.

Nothing here is a pickle that runs code: weights are safetensors, training state is read with `weights_only=True`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pssl.core.errors import InputError
from pssl.core.files import write_atomically

FORMAT = "pssl-checkpoint-1"


def save_weights(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write named tensors and a JSON description as one .safetensors file."""
    metadata = {"format": FORMAT, "description": json.dumps(description)}
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, lambda partial: partial.write_bytes(save(own, metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file of :func:`save_weights`."""
    return _read(path, whole=True)


def load_description(path: Path) -> dict[str, Any]:
    """The description alone, from the file's header: no tensor is read."""
    return _read(path, whole=False)[1]


def _read(path: Path, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file at {path}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if whole else {}
    except SafetensorError as error:
        raise InputError(f"{path}: expected a {FORMAT} file, got none of safetensors ({error})") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: expected a {FORMAT} file, its format says {metadata.get('format')!r}")
    return tensors, json.loads(metadata["description"])


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write training state: tensors, numbers, strings, lists and dicts of them."""
    write_atomically(path, lambda partial: torch.save(state, partial))


def load_state(path: Path) -> dict[str, Any]:
    """Read training state, refusing anything but tensors and plain values."""
    return torch.load(path, map_location="cpu", weights_only=True)

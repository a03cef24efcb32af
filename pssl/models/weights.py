"""Loading backbone weights from files without running anything they contain.

Three kinds of file are read: .safetensors, .pth state dicts (`weights_only`), and MXNet's .params (ResNet38d's, read by
`mxnet_params`). A file may hold more than the backbone, under any prefix: ``module.``, SEAM's own names, IRN's
``resnet50.``, a checkpoint of ours. The prefix is the one under which most of the backbone's tensors are found.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pssl.core.errors import InputError
from pssl.models.backbones import Backbone
from pssl.models.backbones.resnet38d import name_from_mxnet
from pssl.models.mxnet_params import read_params


@dataclass(frozen=True)
class WeightsReport:
    """Outcome of a load: `matched` tensors of the backbone came from the file, found there under `prefix`.

    `unused` are names of the file that the backbone has no place for (a classifier, say).
    """

    path: Path
    digest: str
    matched: int
    unused: tuple[str, ...]
    prefix: str = ""

    def __str__(self) -> str:
        unused = f", {len(self.unused)} left ({', '.join(self.unused[:4])})" if self.unused else ""
        prefix = f" under {self.prefix}*" if self.prefix else ""
        return f"{self.path.name}: {self.matched} tensors matched{prefix}{unused}; sha256 {self.digest[:12]}"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a .safetensors file, an MXNet .params file or a .pth state dict; none of its code runs.

    MXNet's names become ours where `name_from_mxnet` knows them. In a .pth, the state dict may lie under "state_dict",
    "model" or "net" and its names may start with "module." (DataParallel). Raises FileNotFoundError, and InputError
    naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file at {path}, found none")
    if path.suffix == ".params":
        return {name_from_mxnet(k) or k: torch.from_numpy(array) for k, array in read_params(path).items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(
                f"{path}: expected a safetensors file, got one that cannot be read ({error})"
            ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no type of its own for broken and for unsafe files
        # torch's own text recommends to run what is in the file
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"one that names {named[1]}" if named else f"one that cannot be read ({type(error).__name__})"
        )
        raise InputError(
            f"{path}: expected a state dict of tensors and nothing else, got {reason}"
        ) from error
    for key in ("state_dict", "model", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def best_prefix(wanted: Collection[str], names: Collection[str]) -> str:
    """Return the prefix under which most of `wanted` are among `names`; of equals the shortest, then first; or "".

    IRN's file holds every tensor twice, as ``resnet50.layer1.0…`` and as ``stage1.4.0…``: only the former ends in the
    backbone's names.
    """
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                found["".join(part + "." for part in parts[:cut])] += 1
    return min(found, key=lambda prefix: (-found[prefix], len(prefix), prefix), default="")


def load_weights(backbone: Backbone, path: Path) -> WeightsReport:
    """Load a file into a backbone, which must find all its tensors there, of its own shapes; more may be there.

    Files name the tensors of `backbone.named`. Values are converted to the backbone's types. Raises InputError,
    naming the file and the first tensors that are missing or of other shapes.
    """
    target = backbone.named
    held = read_tensors(path)
    own = target.state_dict()
    prefix = best_prefix(own.keys(), held.keys())
    tensors = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in tensors and name not in counters]
    wrong = [
        f"{name} expected {list(own[name].shape)}, got {list(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if missing or wrong:
        problems = [f"missing {name}" for name in missing] + wrong
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{path}: does not fit {type(backbone).__name__}: {'; '.join(problems[:5])}{more}")
    matched = {name: value for name, value in tensors.items() if name in own}
    target.load_state_dict(matched, strict=False)
    unused = tuple(
        name for name in held if not name.startswith(prefix) or name.removeprefix(prefix) not in own
    )
    return WeightsReport(path, file_digest(path), len(matched), unused, prefix)

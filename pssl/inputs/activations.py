"""Activations of a frozen backbone, computed once per image, scale and flip, and kept on disk.

With a frozen backbone every epoch and every arm sees the same activations, so training costs only the two 1x1 layers
on top. One folder holds one set, named by a hash of all that made it; files are float16 .npy, read through memory
maps. A set appears whole or not at all (written beside its place, then renamed).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pssl.core.cache import cache_dir
from pssl.core.errors import InputError
from pssl.core.files import folder_in_the_making
from pssl.core.log import Log
from pssl.core.ranks import is_first, wait
from pssl.data.transforms import to_float
from pssl.models.weights import file_digest

FORMAT = "pssl-activations-1"


@dataclass(frozen=True)
class ActivationSet:
    """Activations of N images: per scale a float16 array [flips,N,channels,h,w]; flip 1 is the mirrored image."""

    folder: Path
    scales: dict[float, np.ndarray]

    def rows(self, indices: Sequence[int], flips: Sequence[int], scale: float) -> Tensor:
        """Activations [B,channels,h,w] float32 of images `indices`, mirrored where `flips` is 1."""
        array = self.scales[scale]
        rows = np.stack([array[flip, index] for index, flip in zip(indices, flips, strict=True)])
        return torch.from_numpy(rows).float()


def fingerprint(images: Tensor, description: dict) -> str:  # uint8 [N,3,S,S]
    """Hex name of an activation set: a hash of the pixels that the backbone is shown and of `description`."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **description}, sort_keys=True).encode())
    digest.update(str(tuple(images.shape)).encode())
    digest.update(np.ascontiguousarray(images.numpy()).data)
    return digest.hexdigest()[:32]


def cached_activations(
    root: Path,
    images: Tensor,  # uint8 [N,3,S,S]
    backbone: nn.Module,
    scales: Sequence[float],
    *,
    description: dict,
    on_batch: Callable[[int, int], None] | None = None,
    batch_size: int = 4,
) -> ActivationSet:
    """The activation set of these images under `root`, computed now if it is not there.

    `description` names all else that matters: backbone, digest of its weights. Scales are part of the name too.
    `on_batch(done, total)` is told about progress in images.
    """
    scales = sorted(set(scales))
    name = fingerprint(images, {**description, "scales": scales})
    folder = root / name
    if not folder.is_dir():
        try:
            with folder_in_the_making(folder) as partial:
                _compute(partial, images, backbone, scales, on_batch, batch_size)
                (partial / "made_from.json").write_text(
                    json.dumps({**description, "scales": scales}, indent=1)
                )
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    arrays = {s: np.load(folder / f"scale_{s}.npy", mmap_mode="r", allow_pickle=False) for s in scales}
    return ActivationSet(folder, arrays)


@torch.no_grad()
def _compute(
    folder: Path,
    images: Tensor,
    backbone: nn.Module,
    scales: Sequence[float],
    on_batch: Callable[[int, int], None] | None,
    batch_size: int,
) -> None:
    """Fill `folder` with one .npy a scale."""
    device = next(backbone.parameters()).device
    total = len(images)
    arrays: dict[float, np.ndarray] = {}
    for begin in range(0, total, batch_size):
        batch = images[begin : begin + batch_size].to(device)
        for scale in scales:
            inputs = resized(backbone.normalise(to_float(batch)), scale)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            for flip in (0, 1):
                out = backbone(inputs.flip(3) if flip else inputs).half().cpu().numpy()
                if not np.isfinite(out).all():
                    raise InputError(f"feature cache: backbone activations at scale {scale} exceed float16")
                if scale not in arrays:
                    arrays[scale] = np.lib.format.open_memmap(
                        folder / f"scale_{scale}.npy", "w+", np.float16, (2, total, *out.shape[1:])
                    )
                arrays[scale][flip, begin : begin + len(out)] = out
        if on_batch is not None:
            on_batch(min(begin + batch_size, total), total)
    for array in arrays.values():
        array.flush()


def resized(images: Tensor, scale: float) -> Tensor:  # [B,3,H,W]
    """Images resized bilinearly to sides round(H * scale), round(W * scale)."""
    if scale == 1:
        return images
    sides = [max(round(side * scale), 1) for side in images.shape[2:]]
    return F.interpolate(images, size=sides, mode="bilinear", align_corners=False)


def frozen_activations(
    images: Tensor,  # uint8 [N,3,S,S]
    backbone: torch.nn.Module,
    name: str,
    weights: Path,
    scales: Sequence[float],
    log: Log,
) -> ActivationSet:
    """Activations of the backbone of that name, whose weights came from a file: computed, or found in the cache."""
    folded = backbone.folded().to(memory_format=torch.channels_last)
    made_from = {"backbone": name, "weights": file_digest(weights)}
    with log.progress("backbone activations", len(images)) as bar:
        done = 0

        def on_batch(now: int, total: int) -> None:
            nonlocal done
            bar.advance(now - done)
            done = now

        def compute():
            root = cache_dir() / "activations"
            return cached_activations(root, images, folded, scales, description=made_from, on_batch=on_batch)

        if not is_first():
            wait()
        activations = compute()
        if is_first():
            wait()
        bar.advance(len(images) - done, "" if done else "found in the cache")
    return activations

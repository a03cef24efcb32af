"""What the stages share: the data set, its inputs, and networks made from a configuration or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pssl.cli import from_dict, to_dict
from pssl.config import BackboneConfig, DataConfig, EngineConfig, FolderConfig, ModelConfig
from pssl.data.cache import cache_dir
from pssl.data.check import check_images, check_labels
from pssl.data.open import DataFolder, open_folder
from pssl.data.synthetic import SyntheticConfig, ensure_synthetic
from pssl.data.voc import VOCFolder
from pssl.engine import checkpoint
from pssl.engine.distributed import is_first, wait
from pssl.engine.feature_cache import ActivationSet, cached_activations
from pssl.engine.inputs import ActivationInputs, FileInputs, ImageInputs, Inputs, load_square_images
from pssl.engine.log import Log
from pssl.engine.seeding import derive_seed
from pssl.method.readout import Prototypes
from pssl.models.cam_net import CamNet, build_cam_net
from pssl.models.weights import PACKAGES, file_digest, find_weights, load_weights


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA (this rank's, under torchrun) where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def memory_format(engine: EngineConfig) -> torch.memory_format:
    """The memory order of images and convolutions."""
    return torch.channels_last if engine.channels_last else torch.contiguous_format


def open_data(config: FolderConfig) -> DataFolder:
    """The data folder of the configuration; the embedded set is written first if need be."""
    if config.root is not None:
        return open_folder(
            config.root,
            layout=config.layout,
            labels=config.labels,
            masks=config.masks,
            classes=config.classes,
        )
    if is_first():
        ensure_synthetic(None, SyntheticConfig(variant=config.variant))
    wait()
    return VOCFolder(ensure_synthetic(None, SyntheticConfig(variant=config.variant)))


@dataclass(frozen=True)
class UsableImages:
    """The images of a split that can be used: `ids` to be shown to a network, `scored` those of them with a mask."""

    ids: list[str]
    scored: frozenset[str]


def usable_images(
    folder: DataFolder, split: str, check: Literal["headers", "decode", "nothing"], log: Log
) -> UsableImages:
    """The images of `split` that can be used; the others are named in the log, with what is wrong with each.

    An image is left out whose file is missing, damaged or without image-level labels; one without a sound mask is
    trained on, but not scored. Raises ValueError if nothing is left.
    """
    ids = folder.ids(split)
    if check == "nothing":
        return UsableImages(ids, frozenset(ids))
    found = check_images(folder, ids, masks=True, decode=check == "decode")
    unlabelled = check_labels(folder, [i for i in ids if i not in found.images])
    with_masks = [image_id for image_id in ids if image_id not in found.masks]
    lines = [*(line for lines in found.images.values() for line in lines), *unlabelled.values()]
    if with_masks:  # a split without any mask has none on purpose
        lines += [line for lines in found.masks.values() for line in lines]
    for line in dict.fromkeys(lines):  # a broken label file is one problem, not one an image
        log.say(f"problem: {line}")
    kept = [image_id for image_id in ids if image_id not in found.images and image_id not in unlabelled]
    if len(kept) < len(ids) or lines:
        scored = len(set(kept) & set(with_masks))
        log.say(f"{split}: {len(kept)} of {len(ids)} images are left, {scored} of them with a mask")
    if not kept:
        raise ValueError(f"{folder.root}, split {split}: expected images, got none that can be used")
    return UsableImages(kept, frozenset(with_masks))


def weights_path(config: BackboneConfig) -> Path | None:
    """The backbone's weights file, None for a backbone that starts from random weights."""
    if config.weights is not None:
        return config.weights
    return find_weights(config.backbone) if config.backbone in PACKAGES else None


def net_of(config: ModelConfig, classes: int) -> CamNet:
    """The network that a configuration describes, with random weights."""
    return build_cam_net(
        config.backbone,
        classes,
        dim=config.dim,
        width=config.width,
        logit_scale=config.logit_scale,
        frozen=config.frozen,
        timm=config.timm,
        output_stride=config.output_stride,
        fixed=config.fixed,
        dropout=config.dropout,
    )


def new_net(
    config: ModelConfig,
    classes: int,
    seed: int,
    say: Callable[[str], None] | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> CamNet:
    """A network as training starts from: backbone weights loaded, the rest random by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        net = net_of(config, classes)
    path = weights_path(config)
    if path is not None:
        report = load_weights(net.backbone, path)
        if say is not None:
            say(f"backbone weights {report}")
    elif config.frozen or config.fixed != "nothing":
        what = "frozen" if config.frozen else f"fixed={config.fixed}"
        raise ValueError(
            f"model.{what}: expected a backbone with weights, got random ones; give --model.weights"
        )
    return net.to(memory_format=memory_format)


def new_pixel_correlation(net: CamNet, seed: int) -> None:
    """Give `net` SEAM's module with weights drawn by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pixel correlation"))
        net.add_pixel_correlation()


def build_inputs(
    folder: DataFolder,
    ids: Sequence[str],
    net: CamNet,
    data: DataConfig,
    model: ModelConfig,
    scales: Sequence[float],
    log: Log,
    memory_format: torch.memory_format = torch.channels_last,
) -> Inputs:
    """Inputs of these images for `net`: activations (computed or found in the cache) if its backbone is frozen."""
    labels = torch.from_numpy(folder.image_labels(ids)).float()
    device = next(net.parameters()).device
    normalise, more = net.backbone.normalise, {"colours": data.colour_jitter, "memory_format": memory_format}
    if data.loading == "files":
        if net.frozen:
            raise ValueError(
                "data.loading: expected 'memory' with model.frozen, whose activations are cached for squares, "
                "got 'files'"
            )
        return FileInputs(
            folder, ids, labels, normalise, data.size, data.zoom, device, workers=data.workers, **more
        )
    images = load_square_images(folder, ids, data.size)
    if not net.frozen:
        return ImageInputs(ids, images, labels, normalise, data.zoom, device, **more)
    activations = frozen_activations(images, net.backbone, model.backbone, weights_path(model), scales, log)
    return ActivationInputs(ids, images, activations, labels, device)


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


@dataclass(frozen=True)
class TrainedNet:
    """A network from a checkpoint, with what is needed to use it."""

    net: CamNet
    prototypes: Prototypes
    model: ModelConfig
    classes: tuple[str, ...]
    size: int
    loading: Literal["memory", "files"]
    """How training read its images (`DataConfig.loading`)."""
    description: dict


def save_net(
    path: Path,
    net: CamNet,
    prototypes: Prototypes,
    model: ModelConfig,
    classes: Sequence[str],
    size: int,
    **more,
) -> None:
    """Write a network, its prototypes and its description; a frozen backbone is named by digest, not copied."""
    source = weights_path(model)
    description = {
        "model": {**to_dict(model), "weights": None if model.weights is None else str(model.weights)},
        "backbone_digest": file_digest(source) if net.frozen else None,
        "classes": list(classes),
        "size": size,
        "temperature": prototypes.temperature,
        "pixel_correlation": net.pixel_correlation is not None,
        **more,
    }
    tensors = {f"net.{name}": value for name, value in net.trained_state().items()}
    tensors |= {"prototypes.rows": prototypes.rows, "prototypes.valid": prototypes.valid}
    checkpoint.save_weights(path, tensors, description)


def load_net(path: Path, device: torch.device | str = "cpu") -> TrainedNet:
    """The network of :func:`save_net`, in eval mode."""
    tensors, description = checkpoint.load_weights(path)
    model = from_dict(ModelConfig, description["model"], str(path))
    net = net_of(model, len(description["classes"]))
    if description.get("pixel_correlation"):
        net.add_pixel_correlation()
    if model.frozen:
        source = weights_path(model)
        if file_digest(source) != description["backbone_digest"]:
            raise ValueError(
                f"{path}: expected backbone weights with sha256 {description['backbone_digest'][:12]}, "
                f"got {file_digest(source)[:12]} from {source}"
            )
        load_weights(net.backbone, source)
    net.load_trained_state({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    rows = Prototypes(
        tensors["prototypes.rows"].to(device),
        tensors["prototypes.valid"].to(device),
        description["temperature"],
    )
    return TrainedNet(
        net.eval().to(device, memory_format=torch.channels_last),
        rows,
        model,
        tuple(description["classes"]),
        description["size"],
        description.get("loading", "memory"),
        description,
    )

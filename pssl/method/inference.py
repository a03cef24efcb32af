"""Reading a trained network: multi-scale, mirrored, at the size of each image; two readouts from the same passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.config.reading import InferenceConfig
from pssl.core.ranks import share, sum_over_ranks
from pssl.inputs.images import Inputs
from pssl.method.readout import prototype_margin
from pssl.method.terms.rcm import RCM, RCMConfig, image_prototypes
from pssl.models.cam_net import CamNet
from pssl.models.prototypes import Prototypes

EPS = 1e-5
READOUTS = ("cam", "prototype")


@dataclass(frozen=True)
class ImageMaps:
    """What an image's pixels say: float16 maps [k,H,W] in 0..1 by readout, for the regions `class_ids` (1..K) [k]."""

    id: str
    class_ids: Tensor
    maps: dict[str, Tensor]


@torch.no_grad()
def final_prototypes(
    net: CamNet,
    inputs: Inputs,
    size: int,
    config: RCMConfig,
    inference: InferenceConfig,
    scales: Sequence[float],
    trained_with: RCM | None = None,
) -> Prototypes:
    """Prototypes of the whole training split, as RCM forms them: per image and region, then the mean over images.

    The network's own outputs at `scales` (SupportNet's) give the regions, its features at scale 1 the prototypes: by
    the module that it was `trained_with`, or, without one, by the CAMs. Ranks share the images.
    """
    rcm = trained_with or RCM(net.classes, net.dim, size, config)
    device = next(net.parameters()).device
    total = torch.zeros(net.classes + 1, net.dim, dtype=torch.float64, device=device)
    count = torch.zeros(net.classes + 1, dtype=torch.float64, device=device)
    net.eval()
    for batch in inputs.batches(share(range(len(inputs.ids))), inference.batch_size):
        seen = {scale: net(inputs.plain(batch, scale, False)) for scale in sorted({1.0, *scales})}
        labels = inputs.labels[batch].to(device)
        aims = [seen[scale] for scale in scales]
        maps = rcm.readout(aims, labels, inputs.pixels(batch)) if rcm.anchored else None
        regions = rcm.regions(aims, labels, maps)
        rows, present = image_prototypes(seen[1.0].features, regions, rcm.num_regions)
        total += torch.where(present[..., None], rows, 0).double().sum(0)
        count += present.double().sum(0)
    total, count = sum_over_ranks(total), sum_over_ranks(count)
    return Prototypes(F.normalize(total, dim=-1).float(), count > 0, config.temperature)


def read_images(
    net: CamNet,
    inputs: Inputs,
    indices: Sequence[int],
    sizes: Callable[[str], tuple[int, int]],
    config: InferenceConfig,
    prototypes: Prototypes | None,
) -> Iterator[ImageMaps]:
    """The maps of images `indices`, at the size (H, W) that `sizes` gives for their ids, as they are ready: inputs read
    from files come by size (`Inputs.batches`).

    `cam`: max(CAM, 0), mirrored passes averaged, resized, summed over scales, divided by its maximum (+1e-5).
    `prototype` (where `prototypes` is given): p = softmax over the image's classes and background of
    cos(f, p_c) / temperature at each cell, averaged over mirrored passes and, resized, over scales; the map is
    (1 + p_c - p_background) / 2, so that 0.5 is where class and background are equally likely.
    Maps are rounded to float16, which is also what is written to disk.
    """
    net.eval()
    for batch in inputs.batches(indices, config.batch_size):
        labels = inputs.labels[batch] > 0
        with torch.no_grad():
            grids = [
                _read_scale(net, inputs, batch, scale, labels, config.flip, prototypes)
                for scale in config.scales
            ]
        for row, index in enumerate(batch):
            classes = labels[row].nonzero().flatten()
            size = sizes(inputs.ids[index])
            maps = {"cam": _normalised(_sum_resized([g["cam"][row, classes] for g in grids], size))}
            if prototypes is not None:
                share_of = _sum_resized([g["margin"][row, classes] for g in grids], size) / len(grids)
                maps["prototype"] = (1 + share_of) / 2
            yield ImageMaps(
                inputs.ids[index],
                (classes + 1).to(torch.uint8),
                {name: value.half() for name, value in maps.items()},
            )


def _read_scale(
    net: CamNet,
    inputs: Inputs,
    batch: Sequence[int],
    scale: float,
    labels: Tensor,
    flip: bool,
    prototypes: Prototypes | None,
) -> dict[str, Tensor]:
    """One scale's maps [B,K,h,w] on the CPU, mirrored passes averaged."""
    passes = []
    for mirrored in (False, True) if flip else (False,):
        output = net(inputs.plain(batch, scale, mirrored))
        maps = {"cam": output.maps}
        if prototypes is not None:
            maps["margin"] = prototype_margin(output.features, prototypes, labels.to(output.cam.device))
        passes.append({name: value.flip(3) if mirrored else value for name, value in maps.items()})
    return {name: torch.stack([p[name] for p in passes]).mean(0).float().cpu() for name in passes[0]}


def _sum_resized(grids: list[Tensor], size: tuple[int, int]) -> Tensor:  # each [k,h,w]
    """The sum of maps of several grids, resized to `size`: [k,H,W]."""
    total = torch.zeros(grids[0].shape[0], *size)
    if len(total):
        for grid in grids:
            total += F.interpolate(grid[None], size=size, mode="bilinear", align_corners=False)[0]
    return total


def _normalised(cams: Tensor) -> Tensor:  # [k,H,W]
    """Each class divided by its maximum (+1e-5)."""
    return cams / (cams.amax((1, 2), keepdim=True) + EPS) if len(cams) else cams

"""RCM, the Regional Contrastive Module: pull each pixel's feature to the prototype of its region.

SupportNet's CAMs give a region mask; its features, averaged by region, give prototypes; MainNet's features are
classified by their cosines to the prototypes of *other* images (paper, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pssl.config.values import Integers, require
from pssl.core.ranks import gather_rows, share_of_mean, world_size
from pssl.method.readout import map_regions, readout_maps
from pssl.method.terms.base import Nets, Setting, Step, Term
from pssl.method.terms.registry import register
from pssl.models.cam_net import CamOutput
from pssl.models.prototypes import Prototypes
from pssl_ext import cam_regions, prototype_contrast, prototype_pool


@dataclass
class RCMConfig:
    """Regional Contrastive Module (paper, section 3)."""

    weight: float = 1.0
    """Weight of the loss (paper: 1)."""
    foreground: float = 0.3
    """A pixel whose normalised support CAM is at least this belongs to its best class (paper: 0.3)."""
    background: float | None = None
    """A pixel below this is background; those between are ignored. None: equal to `foreground` (paper)."""
    temperature: float = 0.5
    """Temperature of the softmax over cosines (paper: 0.5)."""
    memory: int = 5
    """Prototypes kept per class for images whose batch holds no other image of that class. Measured on
    photographs."""
    refresh_epochs: int = 0
    """Every so many epochs of an arm, SupportNet starts anew as MainNet, and from the first time on the region masks
    are its prototype readout, by prototypes of the whole training split, instead of its CAMs. Each time the masks
    gain on the CAMs that the arm began with. Ours; 0 never does it (paper)."""
    readout_foreground: float = 0.75
    """`foreground` of masks by the readout, whose maps are 0.5 where class and background are equally likely.
    Measured on photographs."""
    readout_background: float = 0.55
    """`background` of masks by the readout. Measured on photographs."""
    refine_dilations: Integers = ()
    """Distances of the neighbours, in cells of the label grid, by whose colours the readout is refined before it
    becomes masks (PAR, Ru et al. 2022, who take 1, 2, 4, 8, 12, 24 at full resolution). Ours; empty: it is not."""
    label_stride: int = 1
    """The region mask has side `data.size // label_stride`: 1 is label resolution, the backbone's stride its feature
    grid."""
    prototypes: Literal["leave_one_out", "batch"] = "leave_one_out"
    """What an image's pixels are compared with. "leave_one_out": the mean prototypes of the other images of the batch,
    so that no image confirms its own mask (measured on photographs); "batch": those of all of them, itself included."""
    from_epoch: int = 0
    """First epoch of an arm, counted from 0, in which the term takes part."""

    def __post_init__(self) -> None:
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        require("memory", self.memory, self.memory >= 0, "0 or more")
        require("label_stride", self.label_stride, self.label_stride >= 1, "1 or more")


def image_prototypes(
    features: Tensor,  # [B,D,h,w]
    regions: Tensor,  # uint8 [B,H,W], 255 ignored
    num_regions: int,
) -> tuple[Tensor, Tensor]:
    """Each image's prototype of each region: the L2-normalised mean of its pixels' L2-normalised features.

    Returns float32 prototypes [B,C,D] and bool [B,C], true where the image has the region.
    """
    sums, mass = prototype_pool(features, regions, num_regions)
    return F.normalize(sums, dim=-1), mass > 0


class PrototypeMemory(nn.Module):
    """The last `depth` image prototypes of each region, for regions that the rest of the batch lacks."""

    def __init__(self, num_regions: int, dim: int, depth: int = 5) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_regions, depth, dim))
        self.register_buffer("pushed", torch.zeros(num_regions, dtype=torch.int64))

    def push(self, prototypes: Tensor, present: Tensor) -> None:  # [N,C,D], bool [N,C]
        """Store the present prototypes, in the order of the images, over the oldest."""
        regions, depth, dim = self.rows.shape
        if depth == 0:
            return
        number = present.cumsum(0) - 1  # [N,C]: which of its region's new ones this is
        count = present.sum(0)  # [C]
        stays = present & (number >= count - depth)  # the last `depth`, or several would go to one place
        place = torch.arange(regions, device=count.device) * depth + (self.pushed + number) % depth
        # what goes nowhere goes to a row past the end: no values are read on the host
        rows = torch.cat([self.rows.view(-1, dim), self.rows.new_empty(1, dim)])
        rows[torch.where(stays, place, regions * depth)] = prototypes.detach().to(rows.dtype)
        self.rows.copy_(rows[:-1].view_as(self.rows))
        self.pushed += count

    def clear(self) -> None:
        """Forget all, as when the embedding that the prototypes live in has changed."""
        self.rows.zero_()
        self.pushed.zero_()

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean of what is stored, [C,D], and bool [C], true where there is something."""
        held = self.pushed.clamp(max=self.rows.shape[1])
        return self.rows.sum(1) / held.clamp(min=1)[:, None], held > 0


def leave_one_out(
    own: Tensor,  # [B,C,D]: this rank's images
    own_present: Tensor,  # bool [B,C]: those that are left out; none: the mean over all images
    everyone: Tensor,  # [N,C,D]: all ranks' images, this rank's among them
    everyone_present: Tensor,  # bool [N,C]
    fallback: Tensor,  # [C,D]
    fallback_valid: Tensor,  # bool [C]
) -> tuple[Tensor, Tensor]:
    """For each image and region the mean prototype over the other images that have the region.

    An image is not compared with itself, or its own mask would be confirmed by its own pixels. Where no other image
    has the region, `fallback` stands in. Returns [B,C,D] and bool [B,C], true where there is a prototype at all.
    """
    weight = everyone_present.to(everyone.dtype)
    own_weight = own_present.to(own.dtype)
    others = weight.sum(0) - own_weight
    total = torch.einsum("nc,ncd->cd", weight, everyone)
    mean = (total - own_weight[..., None] * own) / others.clamp(min=1)[..., None]
    has_others = others > 0
    prototypes = torch.where(has_others[..., None], mean, fallback)
    return prototypes, has_others | fallback_valid


class RCM(nn.Module):
    """The module with its memory. Its loss has a gradient to MainNet's features only.

    Region masks come from SupportNet's CAMs (the paper) or, once it has been anchored, from SupportNet's prototype
    readout (ours, see `RCMConfig.refresh_epochs`).

    Args:
        classes: K; regions are background and these.
        dim: D.
        size: side of the square label grid at `label_stride` 1.
        config: thresholds, temperature, memory depth, label stride.
    """

    def __init__(self, classes: int, dim: int, size: int, config: RCMConfig) -> None:
        super().__init__()
        self.num_regions = classes + 1
        self.config = config
        side = max(size // config.label_stride, 1)
        self.size = (side, side)
        self.memory = PrototypeMemory(self.num_regions, dim, config.memory)
        self.register_buffer("anchor_rows", torch.zeros(self.num_regions, dim))
        self.register_buffer("anchor_valid", torch.zeros(self.num_regions, dtype=torch.bool))
        self.anchored = False

    def get_extra_state(self) -> Tensor:
        """Whether masks come from the readout: kept with the buffers, and known without asking the device."""
        return torch.tensor(self.anchored)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.anchored = bool(state)

    def anchor(self, prototypes: Prototypes) -> None:
        """Take region masks from the readout by these prototypes from now on; the memory starts anew."""
        self.anchor_rows.copy_(prototypes.rows)
        self.anchor_valid.copy_(prototypes.valid)
        self.anchored = True
        self.memory.clear()

    def readout(
        self,
        support: list[CamOutput],  # at all its scales
        image_labels: Tensor,  # [B,K]
        pixels: Tensor | None,  # [B,3,*,*] in 0..1
    ) -> Tensor:
        """SupportNet's readout by the anchor's prototypes, [B,K,H,W]: see :func:`readout_maps`."""
        return readout_maps(
            [output.features for output in support],
            Prototypes(self.anchor_rows, self.anchor_valid, self.config.temperature),
            image_labels,
            size=self.size,
            pixels=pixels,
            dilations=self.config.refine_dilations,
        )

    def regions(
        self,
        support: list[CamOutput],  # at all its scales
        image_labels: Tensor,  # [B,K]
        readout: Tensor | None = None,  # [B,K,H,W]
    ) -> Tensor:
        """The region mask, uint8 [B,H,W]: from the readout if there is one, else from SupportNet's CAMs."""
        config = self.config
        if readout is not None:
            return map_regions(
                readout, foreground=config.readout_foreground, background=config.readout_background
            )
        return cam_regions(
            [output.cam for output in support],
            image_labels,
            size=self.size,
            foreground=config.foreground,
            background=config.background,
        )

    def forward(
        self,
        main_features: Tensor,  # [B,D,h,w]
        support_features: Tensor,  # [B,D,h,w], scale 1
        support: list[CamOutput],  # at all its scales
        image_labels: Tensor,  # [B,K]
        readout: Tensor | None = None,  # [B,K,H,W], once anchored
    ) -> Tensor:
        """The contrastive loss, a float32 scalar; the memory takes in this batch afterwards."""
        regions = self.regions(support, image_labels, readout)
        own, present = image_prototypes(support_features, regions, self.num_regions)
        everyone, everyone_present = gather_rows(own), gather_rows(present)
        left_out = present if self.config.prototypes == "leave_one_out" else torch.zeros_like(present)
        prototypes, valid = leave_one_out(own, left_out, everyone, everyone_present, *self.memory.mean())
        self.memory.push(everyone, everyone_present)
        loss = prototype_contrast(
            main_features, prototypes, regions, temperature=self.config.temperature, valid=valid
        )
        return share_of_mean(loss, counted(regions, valid)) if world_size() > 1 else loss


def counted(regions: Tensor, valid: Tensor) -> Tensor:  # [B,H,W], bool [B,C]
    """How many pixels the contrast counts: those of a region that has a prototype."""
    present = valid.new_zeros(len(valid), 256)
    present[:, : valid.shape[1]] = valid
    return present.gather(1, regions.flatten(1).long()).sum()


@register
class RCMTerm(Term):
    """The contrast of MainNet's pixels with the prototypes of SupportNet's regions; anchored anew as configured."""

    name = "rcm"
    Config = RCMConfig
    mean_of_images = False  # a mean over pixels that count, of all ranks

    def __init__(self, config: RCMConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.module = RCM(setting.classes, setting.dim, setting.size, config)

    @property
    def support_scales(self) -> tuple[float, ...]:
        """SupportNet's, and 1, whose features make the prototypes."""
        return (1.0, *self.setting.method.support.scales)

    def before_epoch(self, epoch: int, nets: Nets) -> None:
        """Every `refresh_epochs` take the masks from MainNet's readout, and let SupportNet start anew as MainNet."""
        every = self.config.refresh_epochs
        if every and epoch and epoch % every == 0:
            self.module.anchor(nets.prototypes())
            nets.support.restart(nets.main)

    def readout(self, step: Step) -> Tensor | None:
        """Return SupportNet's readout [B,K,H,W] once there are prototypes to read it by, else None."""
        if not self.module.anchored:
            return None
        aims = self._aims(step)
        return step.once("readout", lambda: self.module.readout(aims, step.image_labels, step.pixels))

    def _aims(self, step: Step) -> list[CamOutput]:
        return [step.support[scale] for scale in self.setting.method.support.scales]

    def forward(self, step: Step) -> Tensor:
        """Return the contrastive loss, a scalar."""
        return self.module(
            step.main[1.0].features,
            step.support[1.0].features,
            self._aims(step),
            step.image_labels,
            self.readout(step),
        )

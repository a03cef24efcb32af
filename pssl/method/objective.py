"""The training objective: which passes a step makes, and which losses it takes from them.

Every scale is passed once. SupportNet's scale 1 serves its CAMs and the prototypes; MainNet's scale 1 serves
classification, RCM and MAM. A frozen backbone's activations serve both networks.
"""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pssl.config.train import MethodConfig
from pssl.core.ranks import share_of_mean
from pssl.method.support import SupportNet
from pssl.method.terms.mam import mam_loss
from pssl.method.terms.ppc import ppc_loss
from pssl.method.terms.rcm import RCM
from pssl.method.terms.seam import seam_loss
from pssl.models.cam_net import CamNet, CamOutput

TERMS = ("classification", "rcm", "mam", "seam", "ppc")


def classification_loss(logits: Tensor, image_labels: Tensor) -> Tensor:  # [B,K], [B,K]
    """Multi-label soft-margin loss, a scalar of at least float32 (paper; PSA, SEAM and IRN alike)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.multilabel_soft_margin_loss(logits, image_labels.to(logits.dtype))


class Objective(nn.Module):
    """Classification, and the terms that are switched on.

    Args:
        config: weights and settings of the terms.
        classes: K.
        dim: D.
        size: side of the square training images, which is the label grid's.
        rcm: include RCM.
        mam: include MAM.
        seam: include SEAM; MainNet needs its pixel correlation module.
        ppc: include PPC, which builds on SEAM.
    """

    def __init__(
        self,
        config: MethodConfig,
        classes: int,
        dim: int,
        size: int,
        *,
        rcm: bool = False,
        mam: bool = False,
        seam: bool = False,
        ppc: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.rcm = RCM(classes, dim, size, config.rcm) if rcm else None
        self.mam = mam
        if ppc and not seam:
            raise ValueError("Objective: ppc needs seam, whose refined CAMs it reads")
        self.seam, self.ppc = seam, ppc
        side = max(round(size * config.seam.scale), 1)
        self.second_size = (side, side)

    @property
    def needs_support(self) -> bool:
        """Whether a SupportNet takes part."""
        return self.rcm is not None or self.mam

    @property
    def mam_reads_out(self) -> bool:
        """Whether MAM's target is the prototype readout by now."""
        return self.config.mam.target == "readout" and self.rcm is not None and self.rcm.anchored

    @property
    def main_scales(self) -> tuple[float, ...]:
        """Scales that MainNet sees; 1 is always one of them."""
        return self._main_scales(TERMS)

    def _main_scales(self, names: Container[str]) -> tuple[float, ...]:
        second = (self.config.seam.scale,) if self.seam else ()
        mam = self.config.mam.scales if self.mam and "mam" in names else ()
        return tuple(sorted({1.0, *second, *mam}))

    @property
    def support_scales(self) -> tuple[float, ...]:
        """Scales that SupportNet sees."""
        return self._support_scales(TERMS)

    def _support_scales(self, names: Container[str]) -> tuple[float, ...]:
        rcm, mam = self.rcm is not None and "rcm" in names, self.mam and "mam" in names
        scales = self.config.support.scales if rcm or mam else ()
        return tuple(sorted({*scales, *((1.0,) if rcm else ())}))

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales that a step's inputs must hold."""
        return tuple(sorted({*self.main_scales, *self.support_scales}))

    def active(self, epoch: int) -> set[str]:
        """Names of the terms that take part in an epoch."""
        first = {"rcm": self.config.rcm.from_epoch, "mam": self.config.mam.from_epoch}
        return {name for name in TERMS if epoch >= first.get(name, 0)}

    def forward(
        self,
        main: CamNet,
        support: SupportNet | None,
        inputs: dict[float, Tensor],  # scale -> images or activations, [B,*,*,*]
        image_labels: Tensor,  # [B,K]
        epoch: int | None = None,  # of the arm; None: all terms take part
        pixels: Tensor
        | None = None,  # [B,3,H,W] in 0..1, what the inputs show; for `method.rcm.refine_dilations`
    ) -> dict[str, Tensor]:
        """The losses by name; "total" is their weighted sum. Their averages over ranks are those of the whole batch."""
        names = set(TERMS) if epoch is None else self.active(epoch)
        main_scales, support_scales = self._main_scales(names), self._support_scales(names)
        see, aim = main, support
        if main.frozen and support is not None:
            # what lies before the heads has no gradient and is the same for both: taken once
            inputs = {s: main.activations(inputs[s]) for s in sorted({*main_scales, *support_scales})}
            see, aim = main.head, support.head
        seen = {scale: see(inputs[scale]) for scale in main_scales}
        target = {scale: aim(inputs[scale]) for scale in support_scales}
        with torch.autocast(
            image_labels.device.type, enabled=False
        ):  # the networks' passes alone may be less precise
            losses = self.terms(seen, target, image_labels, names, pixels)
        for name in losses.keys() - {"rcm"}:  # means over images; RCM's is one over pixels, and weighs itself
            losses[name] = share_of_mean(losses[name], len(image_labels))
        losses["total"] = sum(self.weights[name] * loss for name, loss in losses.items())
        return losses

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss in the total, as things stand: MAM's changes with its target."""
        config = self.config
        return {
            "classification": config.classification_weight,
            "rcm": config.rcm.weight,
            "mam": config.mam.readout_weight if self.mam_reads_out else config.mam.weight,
            "seam": config.seam.weight,
            "ppc": config.ppc.weight,
        }

    def terms(
        self,
        seen: dict[float, CamOutput],  # MainNet's outputs by scale
        target: dict[float, CamOutput],  # SupportNet's
        image_labels: Tensor,  # [B,K]
        names: Container[str] = TERMS,
        pixels: Tensor | None = None,  # as for `forward`
    ) -> dict[str, Tensor]:
        """The losses that are switched on and among `names`, without their weights."""
        centre, losses = seen[1.0], {}
        aims = {scale: target[scale] for scale in self.config.support.scales if scale in target}
        readout = None
        anchored = self.rcm is not None and self.rcm.anchored
        if (anchored and "rcm" in names) or (self.mam_reads_out and "mam" in names):
            readout = self.rcm.readout(list(aims.values()), image_labels, pixels)
        if "classification" in names:
            # SEAM classifies both of its views.
            views = [centre, seen[self.config.seam.scale]] if self.seam else [centre]
            each = [classification_loss(CamNet.logits(view.cam), image_labels) for view in views]
            losses["classification"] = sum(each) / len(each)
        if "rcm" in names and self.rcm is not None:
            losses["rcm"] = self.rcm(
                centre.features, target[1.0].features, list(aims.values()), image_labels, readout
            )
        if "mam" in names and self.mam:
            losses["mam"] = mam_loss(
                {scale: seen[scale].cam for scale in self.config.mam.scales},
                {scale: aim.cam for scale, aim in aims.items()},
                image_labels,
                tuple(centre.cam.shape[2:]),
                self.config.mam,
                readout if self.mam_reads_out else None,
            )
        if "seam" in names and self.seam:
            second = seen[self.config.seam.scale]
            losses["seam"] = seam_loss(centre, second, image_labels, self.second_size, self.config.seam)
        if "ppc" in names and self.ppc:
            losses["ppc"] = ppc_loss(centre, seen[self.config.seam.scale], image_labels, self.config.ppc)
        return losses

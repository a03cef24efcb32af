"""The training objective: which passes a step makes, and which losses it takes from them.

Every scale is passed once. SupportNet's scale 1 serves its CAMs and the prototypes; MainNet's scale 1 serves
classification, RCM and MAM.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pssl.config import MethodConfig
from pssl.method.mam import mam_loss
from pssl.method.ppc import ppc_loss
from pssl.method.rcm import RCM
from pssl.method.seam import seam_loss
from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet


def classification_loss(logits: Tensor, image_labels: Tensor) -> Tensor:  # [B,K], [B,K]
    """Multi-label soft-margin loss, a scalar (paper; PSA, SEAM and IRN alike)."""
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
    def main_scales(self) -> tuple[float, ...]:
        """Scales that MainNet sees; 1 is always one of them."""
        second = (self.config.seam.scale,) if self.seam else ()
        return tuple(sorted({1.0, *second, *(self.config.mam.scales if self.mam else ())}))

    @property
    def support_scales(self) -> tuple[float, ...]:
        """Scales that SupportNet sees."""
        if not self.needs_support:
            return ()
        return tuple(sorted({*self.config.support.scales, *((1.0,) if self.rcm else ())}))

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales that a step's inputs must hold."""
        return tuple(sorted({*self.main_scales, *self.support_scales}))

    def forward(
        self,
        main: CamNet,
        support: SupportNet | None,
        inputs: dict[float, Tensor],  # scale -> images or activations, [B,*,*,*]
        image_labels: Tensor,  # [B,K]
    ) -> dict[str, Tensor]:
        """The losses by name; "total" is their weighted sum."""
        config = self.config
        seen = {scale: main(inputs[scale]) for scale in self.main_scales}
        centre = seen[1.0]
        losses = {"classification": classification_loss(main.logits(centre.cam), image_labels)}
        if self.seam:
            second = seen[config.seam.scale]
            # Both views are classified, as SEAM's are.
            smaller = classification_loss(main.logits(second.cam), image_labels)
            losses["classification"] = (losses["classification"] + smaller) / 2
        total = config.classification_weight * losses["classification"]
        if self.seam:
            losses["seam"] = seam_loss(centre, second, image_labels, self.second_size, config.seam)
            total = total + config.seam.weight * losses["seam"]
        if self.ppc:
            losses["ppc"] = ppc_loss(centre, second, image_labels, config.ppc)
            total = total + config.ppc.weight * losses["ppc"]
        if self.needs_support:
            target = {scale: support(inputs[scale]) for scale in self.support_scales}
            support_cams = [target[scale].cam for scale in config.support.scales]
            if self.rcm is not None:
                losses["rcm"] = self.rcm(centre.features, target[1.0].features, support_cams, image_labels)
                total = total + config.rcm.weight * losses["rcm"]
            if self.mam:
                main_cams = [seen[scale].cam for scale in config.mam.scales]
                losses["mam"] = mam_loss(
                    main_cams, support_cams, image_labels, tuple(centre.cam.shape[2:]), config.mam
                )
                total = total + config.mam.weight * losses["mam"]
        losses["total"] = total
        return losses

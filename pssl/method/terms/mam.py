"""MAM, the Multi-scale Attentive Module: MainNet's CAMs at each scale learn from SupportNet's at all scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pssl.config.values import Floats, require_scales
from pssl.core.errors import InputError
from pssl.method.terms.base import Step, Term
from pssl.method.terms.registry import MethodConfig, register
from pssl_ext import cam_compare


@dataclass
class MAMConfig:
    """Multi-scale Attentive Module (paper, section 3)."""

    weight: float = 1.0
    """Weight of the loss (paper: 1)."""
    scales: Floats = (0.5, 1.0, 2.0)
    """Scales of MainNet's CAMs (paper)."""
    attention: Literal["cosine", "none"] = "cosine"
    """"cosine": each support CAM is weighted by 2 - cos(main CAM, support CAM) (paper); "none": by 1."""
    target: Literal["cam", "readout"] = "cam"
    """What MainNet's CAMs learn from. "cam": SupportNet's CAMs (paper). "readout": once RCM has been refreshed
    (`rcm.refresh_epochs`), the prototype readout: where the class is likelier than background, with the strength of
    SupportNet's CAMs; before, and in arms without RCM, the CAMs. Ours: what the prototypes know reaches the CAM."""
    readout_weight: float = 10.0
    """`weight` while the readout is the target. Measured on photographs: 1 gives the CAM two thirds of what 10 does."""
    pairs: Literal["all", "same", "other"] = "all"
    """Which of SupportNet's scales a CAM of MainNet learns from: "all" of them (paper), that of the "same" scale (then
    all of `scales` must be SupportNet's too), or the "other" ones."""
    from_epoch: int = 0
    """First epoch of an arm, counted from 0, in which the term takes part: in rcm+mam above 0 makes a stage with RCM
    alone, then one with both."""

    def __post_init__(self) -> None:
        require_scales(self.scales)

    def partners(self, scale: float, support: Sequence[float]) -> tuple[float, ...]:
        """The scales of SupportNet that MainNet's CAM of `scale` learns from; ValueError where there is none."""
        wanted = {"all": lambda s: True, "same": scale.__eq__, "other": scale.__ne__}[self.pairs]
        found = tuple(filter(wanted, support))
        if not found:
            raise InputError(
                f"method.mam.pairs={self.pairs}: scale {scale:g} of MainNet has no partner among SupportNet's scales "
                f"{', '.join(f'{s:g}' for s in support)}"
            )
        return found


def mam_loss(
    main: dict[float, Tensor],  # scale -> [B,K,h_s,w_s]
    support: dict[float, Tensor],  # scale -> [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    size: tuple[int, int],
    config: MAMConfig,
    readout: Tensor | None = None,  # [B,K,H,W] in 0..1, above 0.5 where the class is likelier than background
) -> Tensor:
    """L1 between MainNet's CAMs and the attended mean of SupportNet's, a scalar (paper, section 3).

    Per present class, with all maps resized to `size` (the grid of scale 1) and cut at 0:
    sum_s mean |M_s - mean_t w_st S_t|, w_st = 2 - cos(M_s, S_t). The less two maps agree, the larger the target, so
    CAMs grow where only some scales respond. `config.pairs` says which t there are for an s.

    With a `readout` its :func:`readout_target` is the one S_t (ours, see `MAMConfig.target`).
    """
    if readout is not None:
        target, image_labels = readout_target(readout, list(support.values()), image_labels, size)
        groups = [(list(main.values()), [target])]
    elif config.pairs == "all":
        groups = [(list(main.values()), list(support.values()))]
    else:
        groups = [([cam], [support[t] for t in config.partners(s, list(support))]) for s, cam in main.items()]
    losses = [
        cam_compare(seen, aims, image_labels, size=size, attention=config.attention) for seen, aims in groups
    ]
    return sum(losses[1:], losses[0])


def readout_target(
    readout: Tensor,  # [B,K,H,W] in 0..1
    support: list[Tensor],  # T x [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Where the prototype readout sees each class, as strong as SupportNet's CAMs: a map [B,K,*size] for MAM.

    Where a class is likelier than background, by how much, times the factor that gives the map the mean of the
    positive CAMs: the readout says where, the CAMs how much, and the class logits stay what they are. A class that is
    nowhere likelier than background sets no target: the image labels that are returned lack it.
    """
    likelier = F.adaptive_avg_pool2d((2 * readout - 1).relu(), size)
    level = sum(cam.relu().mean((2, 3)) for cam in support) / len(support)
    mean = likelier.mean((2, 3))
    seen = mean > 0
    factor = level / mean.masked_fill(~seen, 1.0)
    return likelier * factor[..., None, None], image_labels * seen


@register
class MAMTerm(Term):
    """MainNet's multi-scale CAMs against SupportNet's, or against the prototype readout once RCM has one."""

    name = "mam"
    Config = MAMConfig

    @classmethod
    def check(cls, config: MAMConfig, method: MethodConfig) -> None:
        """Raise InputError where a scale of MainNet has no partner among SupportNet's."""
        for scale in config.scales:
            config.partners(scale, method.support.scales)

    @property
    def main_scales(self) -> tuple[float, ...]:
        """The CAMs that learn."""
        return self.config.scales

    @property
    def support_scales(self) -> tuple[float, ...]:
        """The CAMs that are learnt from."""
        return self.setting.method.support.scales

    def _readout(self, step: Step) -> Tensor | None:
        """Return the readout [B,K,H,W] where that is the target, else None."""
        with_rcm = self.config.target == "readout" and "rcm" in step.terms
        return step.terms["rcm"].readout(step) if with_rcm else None

    def weight(self, step: Step) -> float:
        """Return `readout_weight` where the readout is the target."""
        return self.config.weight if self._readout(step) is None else self.config.readout_weight

    def forward(self, step: Step) -> Tensor:
        """Return the loss, a scalar."""
        return mam_loss(
            {scale: step.main[scale].cam for scale in self.config.scales},
            {scale: step.support[scale].cam for scale in self.setting.method.support.scales},
            step.image_labels,
            tuple(step.main[1.0].cam.shape[2:]),
            self.config,
            self._readout(step),
        )

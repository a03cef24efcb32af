"""The training objective of an arm: which passes a step makes, and which losses it takes from them.

Every scale is passed once. SupportNet's scale 1 serves its CAMs and the prototypes; MainNet's scale 1 serves
classification, RCM and MAM. A frozen backbone's activations serve both networks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from pssl.core.ranks import share_of_mean
from pssl.method.support import SupportNet
from pssl.method.terms import TERMS, MethodConfig, Nets, Setting, Step, Term
from pssl.method.terms.rcm import RCM
from pssl.models.cam_net import CamNet


class Objective(nn.Module):
    """Classification and further terms.

    Args:
        config: settings of SupportNet and the terms.
        terms: names of the terms beside classification, as in :data:`pssl.method.arms.ARMS`.
        classes: K.
        dim: D.
        size: side of the square training images, which is the label grid's.
    """

    def __init__(
        self, config: MethodConfig, terms: Sequence[str], *, classes: int, dim: int, size: int
    ) -> None:
        super().__init__()
        self.config = config
        setting = Setting(classes, dim, size, config)
        names = tuple(dict.fromkeys(("classification", *terms)))
        self.terms = nn.ModuleDict({name: TERMS[name](getattr(config, name), setting) for name in names})
        for name, term in self.terms.items():
            lacking = [other for other in term.needs if other not in names]
            if lacking:
                raise ValueError(f"Objective: {name} needs {', '.join(lacking)}")

    @property
    def rcm(self) -> RCM | None:
        """The module of RCM, whose prototypes are read out; None without it."""
        return self.terms["rcm"].module if "rcm" in self.terms else None

    @property
    def views(self) -> tuple[float, ...]:
        """Scales that count as views of the image, 1 first."""
        return tuple(dict.fromkeys([1.0, *(scale for term in self.terms.values() for scale in term.views)]))

    def main_scales(self, names: Collection[str] | None = None) -> tuple[float, ...]:
        """Return the scales that MainNet sees for these terms (None: all); 1 is always one of them."""
        return tuple(sorted({1.0, *_scales(term.main_scales for term in self._chosen(names))}))

    def support_scales(self, names: Collection[str] | None = None) -> tuple[float, ...]:
        """Return the scales that SupportNet sees for these terms (None: all); none where it takes no part."""
        return tuple(sorted({*_scales(term.support_scales for term in self._chosen(names))}))

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales that a step's inputs must hold."""
        return tuple(sorted({*self.main_scales(), *self.support_scales()}))

    def _chosen(self, names: Collection[str] | None) -> list[Term]:
        return [term for name, term in self.terms.items() if names is None or name in names]

    def active(self, epoch: int | None) -> list[str]:
        """Return the names of the terms that take part in an epoch; None: all of them."""
        return [name for name, term in self.terms.items() if epoch is None or epoch >= term.from_epoch]

    def equip(self, net: CamNet, seed: int) -> None:
        """Give MainNet what the terms need of it; called before SupportNet is made."""
        for term in self.terms.values():
            term.equip(net, seed)

    def before_epoch(self, epoch: int, nets: Nets) -> None:
        """Let every term do what it does between two epochs."""
        for term in self.terms.values():
            term.before_epoch(epoch, nets)

    def forward(
        self,
        main: CamNet,
        support: SupportNet | None,
        inputs: dict[float, Tensor],  # scale -> images or activations, [B,*,*,*]
        image_labels: Tensor,  # [B,K]
        epoch: int | None = None,  # of the arm; None: all terms take part
        pixels: Tensor | None = None,  # [B,3,H,W] in 0..1, what the inputs show
    ) -> dict[str, Tensor]:
        """Return the losses by name; "total" is their weighted sum. Their averages over ranks are the whole batch's."""
        names = self.active(epoch)
        main_scales, support_scales = self.main_scales(names), self.support_scales(names)
        see, aim = main, support
        if main.frozen and support is not None:
            # what lies before the heads has no gradient and is the same for both: taken once
            inputs = {s: main.activations(inputs[s]) for s in sorted({*main_scales, *support_scales})}
            see, aim = main.head, support.head
        seen = {scale: see(inputs[scale]) for scale in main_scales}
        target = {scale: aim(inputs[scale]) for scale in support_scales}
        step = Step(seen, target, image_labels, pixels, self.views, self.terms)
        with torch.autocast(image_labels.device.type, enabled=False):  # the passes alone may be less precise
            losses = {name: self.terms[name](step) for name in names}
        for name in names:
            if self.terms[name].mean_of_images:
                losses[name] = share_of_mean(losses[name], len(image_labels))
        losses["total"] = sum(self.terms[name].weight(step) * loss for name, loss in losses.items())
        return losses


def _scales(groups: Iterable[tuple[float, ...]]) -> list[float]:
    return [scale for group in groups for scale in group]

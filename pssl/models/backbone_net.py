"""Networks on a backbone that is frozen, or parts of which are fixed."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from pssl.config.model import Fixed
from pssl.models.backbones import Backbone

N = TypeVar("N", bound="BackboneNet")


def fixed_modules(backbone: Backbone, fixed: Fixed) -> list[nn.Module]:
    """Return the modules of a backbone that training leaves as they are.

    They are its batch norms for "norms", these and its `early_layers()` for "early", none for "nothing".
    """
    if fixed == "nothing":
        return []
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return norms + (backbone.early_layers() if fixed == "early" else [])


class BackboneNet(nn.Module):
    """Base class of networks whose backbone has modules that keep eval mode and get no gradient.

    Args:
        backbone: the network's `backbone`.
        frozen: all of the backbone is left as it is.
        fixed: what of a backbone that is trained is left as it is (:func:`fixed_modules`).
    """

    def __init__(self, backbone: Backbone, *, frozen: bool, fixed: Fixed) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(not frozen)
        self.frozen, self.fixed = frozen, fixed
        for module in fixed_modules(backbone, fixed):
            module.requires_grad_(False)

    def train(self: N, mode: bool = True) -> N:
        """Set training mode, but for a frozen backbone and fixed modules."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        for module in fixed_modules(self.backbone, self.fixed):
            module.eval()
        return self

"""The interface of backbones."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from pssl.data.transforms import normalise

B = TypeVar("B", bound="Backbone")


class Pyramid(NamedTuple):
    """Maps of one pass of a backbone.

    `activations` [B,channels,h,w] are the output. `low` are earlier maps, of `low_channels` channels each, the
    shallower first; SEAM's pixel correlation reads them. `fine` [B,fine_channels,H,W] has a finer grid, for decoders;
    it is None where `fine_channels` is.
    """

    activations: Tensor
    low: tuple[Tensor, ...]
    fine: Tensor | None


class Backbone(nn.Module):
    """Base class of backbones. A subclass sets the four attributes and implements :meth:`pyramid`."""

    channels: int
    """Channels of the activations."""
    stride: int
    """Pixels of the image between cells of the activations' grid."""
    low_channels: tuple[int, ...]
    """Channels of the earlier maps, two at most."""
    fine_channels: int | None = None
    """Channels of the finer map; None for a backbone without one."""

    def pyramid(self, images: Tensor) -> Pyramid:  # [B,3,H,W], normalised
        """Return the activations and the maps before them."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:  # [B,3,H,W], normalised
        """Return the activations [B,channels,h,w]."""
        return self.pyramid(images).activations

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """Bring RGB to the range that the weights expect; by default, ImageNet's mean and deviation per channel."""
        return normalise(images)

    def early_layers(self) -> list[nn.Module]:
        """Return the layers that fine-tuning commonly leaves as they are; by default none."""
        return []

    def folded(self: B) -> B:
        """Return a copy for inference, in eval mode: the same function, by subclasses made quicker."""
        return copy.deepcopy(self).eval()

    @property
    def named(self) -> nn.Module:
        """The module whose tensors weights files name; by default the backbone itself."""
        return self

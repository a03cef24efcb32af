"""The network of the method: a backbone, an embedding and a class activation map."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pssl.config.model import Fixed
from pssl.core.errors import InputError
from pssl.models.backbone_net import BackboneNet
from pssl.models.backbones import Backbone
from pssl.models.pixel_correlation import PixelCorrelation


class CamOutput(NamedTuple):
    """Maps of one pass: `features` [B,D,h,w] (not negative) and `cam` [B,K,h,w] (signed).

    `refined` are the region scores [B,1+K,h,w] of a pixel correlation module, None without one.
    """

    features: Tensor
    cam: Tensor
    refined: Tensor | None = None

    @property
    def maps(self) -> Tensor:
        """The class maps [B,K,h,w] to read, not negative: refined where they are, else the CAM's positive part."""
        return self.cam.relu() if self.refined is None else self.refined[:, 1:]


class CamNet(BackboneNet):
    """Backbone -> 1x1 conv -> ReLU = features -> 1x1 conv without bias = CAM.

    Without a bias the pooled CAM is the class logit, so a location's CAM value is its share of that logit (Zhou et
    al. 2016, in the fully convolutional form of AffinityNet and SEAM).

    Args:
        backbone: of :mod:`pssl.models.backbones`.
        classes: K.
        dim: D.
        logit_scale: factor on the CAM, and so on the logits (see `ModelConfig.logit_scale`).
        standardise: give each backbone channel zero mean and unit spread first, with the constants of
            :meth:`set_channel_statistics`; for frozen backbones, whose channels differ in scale.
        frozen, fixed: what of the backbone training leaves as it is (:class:`BackboneNet`).
        dropout: share of the activations' channels that training drops.

    `pixel_correlation` is None, or SEAM's module after :meth:`add_pixel_correlation`.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        dim: int,
        *,
        logit_scale: float = 1.0,
        standardise: bool = False,
        frozen: bool = False,
        fixed: Fixed = "nothing",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone, frozen=frozen, fixed=fixed)
        self.dropout = nn.Dropout2d(dropout)
        self.logit_scale = logit_scale
        self.standardise = standardise
        if standardise:
            self.register_buffer("channel_mean", torch.zeros(backbone.channels))
            self.register_buffer("channel_std", torch.ones(backbone.channels))
        self.embed = nn.Conv2d(backbone.channels, dim, 1)
        self.classifier = nn.Conv2d(dim, classes, 1, bias=False)
        self.pixel_correlation: PixelCorrelation | None = None

    def add_pixel_correlation(self) -> CamNet:
        """Give the network SEAM's module, with random weights; returns the network.

        It reads the backbone's earlier activations and the image, and with a frozen backbone, whose activations come
        from the cache, these alone.
        """
        low = (self.backbone.channels,) if self.frozen else self.backbone.low_channels
        module = PixelCorrelation(low, colours=not self.frozen)
        self.pixel_correlation = module.to(self.embed.weight.device)
        return self

    @property
    def classes(self) -> int:
        """K."""
        return self.classifier.out_channels

    @property
    def dim(self) -> int:
        """D."""
        return self.classifier.in_channels

    def set_channel_statistics(self, mean: Tensor, std: Tensor) -> None:  # [channels], [channels]
        """Set the constants of the standardisation, from the training images."""
        self.channel_mean.copy_(mean)
        self.channel_std.copy_(std)

    def forward(self, inputs: Tensor) -> CamOutput:  # [B,3,H,W] normalised, or [B,channels,h,w]
        """Return features and CAM of normalised images, or of the backbone's (cached) activations."""
        if self.pixel_correlation is not None and not self.frozen:
            maps = self.backbone.pyramid(inputs)
            return self.head(maps.activations.to(self.embed.weight.dtype), maps.low, inputs)
        return self.head(self.activations(inputs))

    def activations(self, inputs: Tensor) -> Tensor:  # as forward
        """Return the head's input, [B,channels,h,w] in the type of its weights. Constant if the backbone is frozen."""
        if inputs.shape[1] == 3:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                inputs = self.backbone(inputs)
        inputs = inputs.to(self.embed.weight.dtype)
        if self.standardise:
            scale = self.channel_std.reciprocal()
            inputs = torch.addcmul((-self.channel_mean * scale)[:, None, None], inputs, scale[:, None, None])
        return inputs

    def head(
        self,
        activations: Tensor,  # [B,channels,h,w], from `activations`
        low: tuple[Tensor, ...]
        | None = None,  # the backbone's earlier activations; None: the last ones in their place
        images: Tensor | None = None,  # [B,3,H,W] normalised
    ) -> CamOutput:
        """Return features and CAM, and refined scores if the network has a module for them."""
        features = self.embed(self.dropout(activations)).relu()
        cam = self.classifier(features) * self.logit_scale
        if self.pixel_correlation is None:
            return CamOutput(features, cam)
        return CamOutput(features, cam, self.pixel_correlation(cam, low or (activations,), images))

    @staticmethod
    def logits(cam: Tensor) -> Tensor:  # [B,K,h,w]
        """Return class logits [B,K], at least float32: the CAM's global mean."""
        return cam.mean((2, 3), dtype=torch.promote_types(cam.dtype, torch.float32))

    def twin(self) -> CamNet:
        """Return a copy with weights of its own; a frozen backbone is shared."""
        shared = {id(self.backbone): self.backbone} if self.frozen else {}
        return copy.deepcopy(self, shared)

    def trained_state(self) -> dict[str, Tensor]:
        """Return the state dict without a frozen backbone, which its own weights file holds."""
        state = self.state_dict()
        return {k: v for k, v in state.items() if not (self.frozen and k.startswith("backbone."))}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`trained_state` returned; InputError where names differ."""
        own = self.trained_state()
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())
            raise InputError(f"CamNet: expected the tensors of this architecture, names differ in {odd[:5]}")
        self.load_state_dict(state, strict=not self.frozen)

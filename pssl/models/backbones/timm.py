"""Any network of timm (the extra of that name) as a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pssl.config.model import BackboneConfig
from pssl.core.errors import InputError, MissingPackage
from pssl.data.transforms import normalise
from pssl.models.backbones.base import Backbone, Pyramid
from pssl.models.backbones.registry import register

_STEMS = ("conv1", "bn1", "conv_stem", "stem", "stem_0", "stem_1", "patch_embed")


def import_timm():
    """Return the package; MissingPackage says in plain words where it is missing or cannot be imported."""
    try:
        import timm
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        raise MissingPackage(
            "model.backbone=timm: timm is not installed; `pip install pssl[timm]`"
            if missing
            else f"model.backbone=timm: timm is installed but cannot be imported ({error}). It needs torchvision, and "
            f"one built for CUDA fails beside torch {torch.__version__}: install both from the same index"
        ) from error
    return timm


class TimmBackbone(Backbone):
    """The last feature map of a timm network, with random weights; weights files name what is in `model`.

    Args:
        name: timm's name, as "resnet50" or "vit_base_patch16_224".
        output_stride: of the grid, 8, 16 or 32, by dilation, for networks that have such an argument; None: the
            network's own. Transformers take images of any size whose sides are multiples of their patches.

    Raises InputError, naming the argument, for an unknown name and for a stride that the network does not offer.
    """

    def __init__(self, name: str, output_stride: int | None = None) -> None:
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
            raise InputError(
                f"model.timm: expected a name of timm {timm.__version__}, got {name!r}; near: {near}"
            )
        self.model, self.transformer = _create(timm, name, output_stride)
        if self.transformer:
            info = self.model.feature_info[-3:]
            channels = [entry["num_chs"] for entry in info]
            strides = [entry["reduction"] for entry in info]
        else:
            channels = self.model.feature_info.channels()
            strides = self.model.feature_info.reduction()
        self.channels, self.stride = channels[-1], strides[-1]
        self.low_channels = tuple(channels[-3:-1])
        finer = not self.transformer and 4 in strides[:-1]
        self._fine_index = list(strides).index(4) if finer else None
        self.fine_channels = None if self._fine_index is None else channels[self._fine_index]
        config = timm.get_pretrained_cfg(name)
        self.mean, self.std = tuple(config.mean), tuple(config.std)

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """Bring colours to the mean and deviation per channel that timm records for the network."""
        return normalise(images, self.mean, self.std)

    def early_layers(self) -> list[nn.Module]:
        """Return the stem, which IRN keeps fixed."""
        return [module for name, module in self.model.named_children() if name in _STEMS]

    @property
    def named(self) -> nn.Module:
        """timm's own network."""
        return self.model

    def pyramid(self, images: Tensor) -> Pyramid:  # [B,3,H,W]
        """Return the last feature map [B,channels,h,w] and the two before it; fine: the one of stride 4, if any.

        A transformer's images are resized to whole patches first; it has no finer map.
        """
        if not self.transformer:
            maps = self.model(images)
        else:
            sides = [max(round(side / self.stride), 1) * self.stride for side in images.shape[2:]]
            if sides != list(images.shape[2:]):
                images = nn.functional.interpolate(images, size=sides, mode="bilinear", align_corners=False)
            maps = self.model.forward_intermediates(images, indices=3, norm=True, intermediates_only=True)
        fine = None if self._fine_index is None else maps[self._fine_index]
        return Pyramid(maps[-1], tuple(maps[-3:-1]), fine)


@register("timm", train_recipe="voc12_resnet50", segment_recipe="voc12_resnet101")
def build(config: BackboneConfig) -> TimmBackbone:
    """Build the network that `timm` names, of `output_stride`."""
    return TimmBackbone(config.timm, config.output_stride)


def _create(timm, name: str, output_stride: int | None) -> tuple[nn.Module, bool]:
    """Return the network, and True for a transformer, which comes whole; others return their feature maps."""
    if output_stride is None:
        try:
            return timm.create_model(name, dynamic_img_size=True, num_classes=0), True
        except TypeError:  # it has no such argument: a network for images of any size
            return timm.create_model(name, features_only=True), False
    try:
        return timm.create_model(name, features_only=True, output_stride=output_stride), False
    except (TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"model.output_stride: {name} does not offer stride {output_stride} ({error})"
        ) from None

"""Any network of timm (the extra of that name) as a backbone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pssl.data.transforms import normalise

_STEMS = ("conv1", "bn1", "conv_stem", "stem", "stem_0", "stem_1", "patch_embed")


def import_timm():
    """The package; an ImportError in plain words where it is missing or cannot be imported."""
    try:
        import timm
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        raise ImportError(
            "model.backbone=timm: timm is not installed; `pip install pssl[timm]`"
            if missing
            else f"model.backbone=timm: timm is installed but cannot be imported ({error}). It needs torchvision, and "
            f"one built for CUDA fails beside torch {torch.__version__}: install both from the same index"
        ) from error
    return timm


class TimmBackbone(nn.Module):
    """The last feature map of a timm network, with random weights; `model` is what weights files name.

    Args:
        name: timm's name, as "resnet50" or "vit_base_patch16_224".
        output_stride: of the grid, 8, 16 or 32, by dilation, for networks that have such an argument; None: the
            network's own. Transformers take images of any size whose sides are multiples of their patches.

    Raises ValueError, naming the argument, for an unknown name and for a stride that the network does not offer.
    """

    def __init__(self, name: str, output_stride: int | None = None) -> None:
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
            raise ValueError(
                f"model.timm: expected a name of timm {timm.__version__}, got {name!r}; near: {near}"
            )
        self.model, self.transformer = _create(timm, name, output_stride)
        if self.transformer:
            info = self.model.feature_info[-3:]
            channels, self.stride = [entry["num_chs"] for entry in info], info[-1]["reduction"]
        else:
            channels, self.stride = (
                self.model.feature_info.channels(),
                self.model.feature_info.reduction()[-1],
            )
        self.channels = channels[-1]
        self.low_channels = tuple(channels[-3:-1])
        strides = [] if self.transformer else list(self.model.feature_info.reduction())
        self.fine_layer = "model" if 4 in strides[:-1] else None
        self.fine_index = strides.index(4) if 4 in strides else 0
        config = timm.get_pretrained_cfg(name)
        self.mean, self.std = tuple(config.mean), tuple(config.std)

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """The mean and deviation per channel that timm records for the network."""
        return normalise(images, self.mean, self.std)

    def early_layers(self) -> list[nn.Module]:
        """The stem, which IRN keeps fixed."""
        return [module for name, module in self.model.named_children() if name in _STEMS]

    def folded(self) -> TimmBackbone:
        """A copy in eval mode."""
        return copy.deepcopy(self).eval()

    def read(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # [B,3,H,W]
        """`forward`'s activations, and the two feature maps before them."""
        if not self.transformer:
            maps = self.model(images)
        else:
            sides = [max(round(side / self.stride), 1) * self.stride for side in images.shape[2:]]
            if sides != list(images.shape[2:]):
                images = nn.functional.interpolate(images, size=sides, mode="bilinear", align_corners=False)
            maps = self.model.forward_intermediates(images, indices=3, norm=True, intermediates_only=True)
        return maps[-1], tuple(maps[-3:-1])

    def forward(self, images: Tensor) -> Tensor:  # [B,3,H,W]
        """Activations [B,channels,h,w]. A transformer's images are resized to whole patches first."""
        return self.read(images)[0]


def _create(timm, name: str, output_stride: int | None) -> tuple[nn.Module, bool]:
    """The network, and whether it is a transformer: whole, to be asked for its last maps; others give maps only."""
    if output_stride is None:
        try:
            return timm.create_model(name, dynamic_img_size=True, num_classes=0), True
        except TypeError:  # it has no such argument: a network for images of any size
            return timm.create_model(name, features_only=True), False
    try:
        return timm.create_model(name, features_only=True, output_stride=output_stride), False
    except (TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"model.output_stride: {name} does not offer stride {output_stride} ({error})"
        ) from None

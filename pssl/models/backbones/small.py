"""The small backbone, trained from scratch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pssl.config.model import BackboneConfig
from pssl.models.backbones.base import Backbone, Pyramid
from pssl.models.backbones.registry import register


class SmallBackbone(Backbone):
    """Five 3x3 conv-BN-ReLU blocks, stride 4: enough for the embedded data, quick on a CPU.

    Strides stay small because a part of an object must span several cells for a CAM to single it out. The last two
    blocks are dilated by 2 and 4: a cell then sees 59 pixels, about an object, and its CAM spills from the part onto
    the body as that of a deep network does. Undilated it sees 27, one part, and nothing else responds.
    """

    stride = 4

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
        self.fine_channels = width // 2

    def early_layers(self) -> list[nn.Module]:
        """Return the first block."""
        return list(self.layers[:3])

    def normalise(self, images: Tensor) -> Tensor:  # [B,3,H,W] in 0..1
        """Bring colours to about zero mean and unit spread."""
        return (images - 0.5) * 4.0

    def folded(self) -> SmallBackbone:
        """Return a copy for inference, each batch norm folded into its convolution: the same function."""
        twin = super().folded()
        for index in range(0, len(twin.layers), 3):
            twin.layers[index] = fuse_conv_bn_eval(twin.layers[index], twin.layers[index + 1])
            twin.layers[index + 1] = nn.Identity()
        return twin

    def pyramid(self, images: Tensor) -> Pyramid:  # [B,3,H,W]
        """Return activations [B,channels,ceil(H/4),ceil(W/4)], not negative, and the fourth block's; fine: stride 2."""
        after_block = []
        x = images
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index % 3 == 2:
                after_block.append(x)
        return Pyramid(x, (after_block[3],), after_block[1])


@register("small", train_recipe="synthetic", segment_recipe="synthetic")
def build(config: BackboneConfig) -> SmallBackbone:
    """Build it of `width` channels."""
    return SmallBackbone(config.width)

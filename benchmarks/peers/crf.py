"""pydensecrf's fully-connected CRF (pip install pydensecrf2), and pictures to run it on."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

LEAST_AGREEMENT = 0.995  # of the labels: both approximate the same sums


def why_not() -> str | None:
    """Why pydensecrf cannot run; None when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its compiled module, about numpy
            import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install pydensecrf2"
    return None


def crf(images: Tensor, probabilities: Tensor) -> Tensor:  # uint8 [B,3,H,W], [B,C,H,W] -> [B,C,H,W]
    """Its defaults, which are ours: sxy 3 with weight 3, sxy 80 and srgb 13 with weight 10, 10 iterations."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    found = []
    for image, given in zip(images.cpu(), probabilities.cpu(), strict=True):
        c, h, w = given.shape
        field = DenseCRF2D(w, h, c)
        field.setUnaryEnergy(unary_from_softmax(given.contiguous().numpy()))
        field.addPairwiseGaussian(sxy=3, compat=3)
        field.addPairwiseBilateral(
            sxy=80, srgb=13, rgbim=np.ascontiguousarray(image.movedim(0, -1).numpy()), compat=10
        )
        found.append(torch.from_numpy(np.array(field.inference(10))).view(c, h, w))
    return torch.stack(found).to(probabilities)


def labels_agree(a: Tensor, b: Tensor) -> float:  # [B,C,H,W], [B,C,H,W]
    """The share of pixels whose label is the same."""
    return float((a.argmax(1) == b.argmax(1)).float().mean())


def photograph(root: Path, number: int) -> tuple[Tensor, Tensor]:
    """(image uint8 [1,3,H,W], classes [1,H,W], 0 where they are unknown) of a VOC folder's masks, at number/4."""
    paths = sorted((root / "SegmentationClass").glob("*.png"))
    path = paths[number * len(paths) // 4]
    image = np.array(Image.open(root / "JPEGImages" / f"{path.stem}.jpg").convert("RGB"))
    classes = np.array(Image.open(path)).astype(np.int64) % 255
    return torch.from_numpy(image).movedim(-1, 0)[None].contiguous(), torch.from_numpy(classes)[None]


def continued(image: Tensor, classes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cut to `size`, or continued to it by reflection: enlarging would smooth, and make the lattice smaller."""
    h, w = classes.shape[1:]
    padding = [(0, max(0, size[0] - h)), (0, max(0, size[1] - w))]
    both = [
        np.pad(t[0].numpy(), [(0, 0)] * (t.ndim - 3) + padding, mode="symmetric")[..., : size[0], : size[1]]
        for t in (image, classes)
    ]
    return tuple(torch.from_numpy(np.ascontiguousarray(x))[None] for x in both)


def drawing(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What stands in for a photograph: areas of one colour, shaded and noisy."""
    g = torch.Generator().manual_seed(0)
    scores = F.interpolate(torch.randn(1, 21, 6, 8, generator=g), size=size, mode="bilinear")
    classes = scores.argmax(1)
    colours = 255 * torch.rand(21, 3, generator=g)
    images = colours[classes].movedim(-1, 1) + 20 * scores[:, :3] + 6 * torch.randn(1, 3, *size, generator=g)
    return images.clamp(0, 255).to(torch.uint8), classes


def disturbed(classes: Tensor, c: int, seed: int = 1) -> Tensor:  # [1,H,W] -> [1,C,H,W]
    """Probabilities: the classes blurred and disturbed. Classes from c on count as c - 1."""
    g = torch.Generator().manual_seed(seed)
    masks = F.one_hot(classes.clamp_max(c - 1), c).movedim(-1, 1).float()
    rough = F.avg_pool2d(masks, 16, ceil_mode=True)
    scores = 4 * rough + 0.7 * torch.randn(rough.shape, generator=g)
    return F.interpolate(scores, size=classes.shape[1:], mode="bilinear").softmax(1)

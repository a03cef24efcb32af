"""dense_crf against pydensecrf, on a photograph where there are any, at the size of VOC's images.

    python benchmarks/bench_dense_crf.py --root <VOC folder>   # prints the tables, writes runs/bench/dense_crf.json

Equal parameters, the default ones: sxy 3 with weight 3, sxy 80 and srgb 13 with weight 10, 10 iterations.
``pydensecrf`` (pip install pydensecrf2) runs on one thread; ours on those of --threads, and is named after the backend.
The photographs' probabilities are their ground truth blurred and disturbed. Smaller photographs than the size asked for
are continued by their reflection: enlarging would smooth them, and make the lattice smaller than it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Problem, ours, run
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import pssl_ext
from pssl_ext import dense_crf
from pssl_ext.registry import OPS

LEAST_AGREEMENT = 0.995  # of the labels


def crf_peer(images: Tensor, probabilities: Tensor) -> Tensor:  # [1,3,H,W], [1,C,H,W] -> [1,C,H,W]
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    _, c, h, w = probabilities.shape
    crf = DenseCRF2D(w, h, c)
    crf.setUnaryEnergy(unary_from_softmax(probabilities[0].numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(
        sxy=80, srgb=13, rgbim=np.ascontiguousarray(images[0].movedim(0, -1).numpy()), compat=10
    )
    return torch.from_numpy(np.array(crf.inference(10))).view(1, c, h, w)


def photograph(root: Path, number: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(image [1,3,H,W], classes [1,H,W], 0 where they are unknown) of the folder's number-th mask."""
    paths = sorted((root / "SegmentationClass").glob("*.png"))
    path = paths[number * len(paths) // 4]
    image = np.array(Image.open(root / "JPEGImages" / f"{path.stem}.jpg").convert("RGB"))
    both = np.concatenate([image, np.array(Image.open(path))[..., None] % 255], 2)
    h, w = both.shape[:2]
    padding = [(0, max(0, size[0] - h)), (0, max(0, size[1] - w)), (0, 0)]
    both = torch.from_numpy(np.pad(both, padding, mode="symmetric")[: size[0], : size[1]]).movedim(-1, 0)[
        None
    ]
    return both[:, :3].contiguous(), both[:, 3].long()


def drawing(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What stands in for a photograph: areas of one colour, shaded and noisy."""
    g = torch.Generator().manual_seed(0)
    scores = F.interpolate(torch.randn(1, 21, 6, 8, generator=g), size=size, mode="bilinear")
    classes = scores.argmax(1)
    colours = 255 * torch.rand(21, 3, generator=g)
    images = colours[classes].movedim(-1, 1) + 20 * scores[:, :3] + 6 * torch.randn(1, 3, *size, generator=g)
    return images.clamp(0, 255).to(torch.uint8), classes


def disturbed(classes: Tensor, c: int) -> Tensor:  # [1,H,W] -> [1,C,H,W]
    g = torch.Generator().manual_seed(1)
    masks = F.one_hot(classes.clamp_max(c - 1), c).movedim(-1, 1).float()
    rough = F.avg_pool2d(masks, 16, ceil_mode=True)
    scores = 4 * rough + 0.7 * torch.randn(rough.shape, generator=g)
    return F.interpolate(scores, size=classes.shape[1:], mode="bilinear").softmax(1)


def problem(name: str, images: Tensor, probabilities: Tensor) -> Problem:
    own = ours("dense_crf")
    providers = {"pydensecrf": crf_peer, own: lambda images, probabilities: dense_crf(images, probabilities)}
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        print(f"pydensecrf is left out ({error}): pip install pydensecrf2")
        del providers["pydensecrf"]
    else:
        labels = [provider(images, probabilities).argmax(1) for provider in providers.values()]
        agreement = float((labels[0] == labels[1]).float().mean())
        changed = float((labels[1] != probabilities.argmax(1)).float().mean())
        print(f"{name}: {100 * agreement:.3f} % of the labels agree, {100 * changed:.1f} % were changed")
        if agreement < LEAST_AGREEMENT:
            raise SystemExit(f"{name}: fewer than {100 * LEAST_AGREEMENT} % of the labels agree")
    return Problem(
        name,
        dict(images=images, probabilities=probabilities),
        (),
        providers,
        own,
        OPS["dense_crf"].bytes_moved(images=images, probabilities=probabilities),
        own_memory=("pydensecrf",),  # what PyTorch and numpy see of it is the result
        tolerance=1e-2,
        exceptions=1 - LEAST_AGREEMENT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder in the layout of VOC 2012; without it, a drawing")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/dense_crf.json"), help="results file")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each problem and provider")
    args = parser.parse_args()
    print(pssl_ext.explain("dense_crf"))
    size = tuple(args.size)
    pictures = {"drawing": drawing(size)}
    if args.root is not None:
        pictures = {f"photograph {i}": photograph(args.root, i, size) for i in (0, 2)}

    def problems() -> Iterator[Problem]:
        for threads in dict.fromkeys(args.threads):
            torch.set_num_threads(threads)  # each problem is measured before the next one is asked for
            for picture, (images, classes) in pictures.items():
                for c in (21, 2):
                    name = f"dense_crf, {picture}, {size[0]}×{size[1]}, C={c}, {threads} threads"
                    yield problem(name, images, disturbed(classes, c))

    run("dense_crf", problems(), device="cpu", seconds=args.seconds, out=args.out)


if __name__ == "__main__":
    main()

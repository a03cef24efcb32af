"""cam_regions: multi-scale CAMs to a class region mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pssl_ext import checks
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, resize_stepwise

OP = "cam_regions"
EPS = 1e-5  # added to the maximum before dividing, as SEAM and IRN do


def reference(
    cams: list[Tensor],  # T of [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    height: int,
    width: int,
    foreground: float,
    background: float,
    ignore_index: int,
) -> Tensor:  # uint8 [B,H,W]
    dtype = accumulation_dtype(*cams)
    present = (image_labels != 0)[:, :, None, None]
    # a class absent from the image is replaced, not multiplied away: 0 · NaN is NaN
    total = sum(
        torch.where(present, resize_stepwise(c.to(dtype), (height, width)), 0.0).relu() for c in cams
    )  # [B,K,H,W]
    if total.numel() == 0:
        return torch.zeros(total.shape[0], height, width, dtype=torch.uint8, device=total.device)
    total = total / (total.amax((2, 3), keepdim=True) + EPS)
    total = torch.where(present, total, -1.0)  # an absent class never wins
    best, index = total.max(1)  # ties: the lowest class
    unsure = torch.where(best < background, 0, ignore_index)
    return torch.where(best >= foreground, index + 1, unsure).to(torch.uint8)


def _fake(a):
    return a.cams[0].new_empty(a.cams[0].shape[0], a.height, a.width, dtype=torch.uint8)


def present_bytes(cams: Sequence[Tensor], image_labels: Tensor) -> int:
    """What has to be read: the labels, and the maps of the classes that are present."""
    cells = sum(c[0, 0].numel() * c.element_size() for c in cams) if image_labels.numel() else 0
    return int((image_labels != 0).sum()) * cells + image_labels.numel() * image_labels.element_size()


def _bytes_moved(cams: Sequence[Tensor], image_labels: Tensor, size: tuple[int, int], **_) -> tuple[int, int]:
    return present_bytes(cams, image_labels) + image_labels.shape[0] * size[0] * size[1], 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(13)

    def cams(b: int, k: int, *sizes: tuple[int, int]) -> list[Tensor]:
        return [torch.randn(b, k, *s, generator=g, dtype=torch.float64).to(dtype).to(device) for s in sizes]

    def labels(b: int, k: int) -> Tensor:
        return torch.randint(0, 2, (b, k), generator=g).to(device)

    yield Sample(
        "multi_scale", dict(cams=cams(2, 3, (4, 5), (8, 10)), image_labels=labels(2, 3), size=(32, 40))
    )
    band = dict(
        cams=cams(2, 3, (7, 9)), image_labels=labels(2, 3), size=(7, 9), foreground=0.6, background=0.4
    )
    yield Sample("ignore_band", band)
    none = dict(cams=cams(1, 3, (4, 4)), image_labels=torch.zeros(1, 3, device=device), size=(8, 8))
    yield Sample("no_class", none)
    several = dict(cams=cams(2, 3, (11, 13), (22, 26)), image_labels=labels(2, 3), size=(70, 150))
    yield Sample("several_tasks", {**several, "foreground": 0.5, "background": 0.3})
    one = dict(cams=cams(1, 1, (1, 1)), image_labels=torch.ones(1, 1, device=device), size=(1, 1))
    yield Sample("one_pixel", one)
    smaller = dict(cams=cams(1, 2, (9, 7), (1, 5)), image_labels=torch.ones(1, 2, device=device), size=(4, 5))
    yield Sample("smaller_mask", smaller)
    broken = dict(several, cams=cams(2, 3, (11, 13), (70, 150)), image_labels=torch.ones(2, 3, device=device))
    broken["cams"][0][0, 1, 2, 3], broken["cams"][1][1, 0, 5, 6] = torch.nan, torch.inf
    yield Sample("not_finite", broken)
    yield Sample("empty_batch", dict(cams=cams(0, 3, (4, 4)), image_labels=labels(0, 3), size=(8, 8)))


@define_op(
    schema=(
        "(Tensor[] cams, Tensor image_labels, SymInt height, SymInt width, float foreground, float background, "
        "int ignore_index) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
)
def cam_regions(
    cams: Sequence[Tensor],  # T of [B,K,h_t,w_t]
    image_labels: Tensor,  # [B,K]
    *,
    size: tuple[int, int],
    foreground: float = 0.3,
    background: float | None = None,
    ignore_index: int = 255,
    backend: str = "auto",
) -> Tensor:  # uint8 [B,H,W]
    """Class region mask from multi-scale CAMs: where RCM takes its prototypes from and what it contrasts with.

    A_k = Σ_t relu(upsample(cams[t]))_k over the classes present in the image, divided by its maximum over the image
    (+1e-5). region(x) = k+1 for the best class if its A ≥ ``foreground``; 0 (background) if A < ``background``;
    ``ignore_index`` between. Ties: the lowest class. A pixel where the best A is NaN is ignored.

    Args:
        cams: list of T tensors [B,K,h_t,w_t], floating, of any sizes; at least one, on a GPU at most 24. Resized as
            ``cam_sweep`` does, with the same bits on every backend.
        image_labels: [B,K], non-zero where the class is present.
        size: (H,W) of the mask.
        foreground: threshold of the foreground, a share of the class's maximum (0.3: Yoon et al. 2021).
        background: threshold of the background; None: = foreground, so that no pixel is ignored.
        ignore_index: label of the band between, 0..255.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        uint8 [B,H,W]. No gradient. Deterministic.

    Raises:
        ValueError, TypeError: for shapes, types, a size below 1×1, more than 254 classes, background > foreground.
    """
    k = _check_cams(OP, "cams", cams, image_labels)
    checks.require(k <= 254, OP, "cams", "of at most 254 classes (the mask is uint8)", k)
    background = foreground if background is None else background
    checks.require(background <= foreground, OP, "background", f"at most foreground={foreground}", background)
    checks.require(
        0 <= ignore_index <= 255, OP, "ignore_index", "in 0..255 (the mask is uint8)", ignore_index
    )
    checks.require_size(OP, "size", size)
    height, width = size
    return call(
        OP,
        backend,
        cams=list(cams),
        image_labels=image_labels,
        height=height,
        width=width,
        foreground=float(foreground),
        background=float(background),
        ignore_index=ignore_index,
    )


def _check_cams(op: str, argument: str, cams: Sequence[Tensor], image_labels: Tensor) -> int:
    """Checks a list of CAM maps against the image labels [B,K]; returns K."""
    checks.require(len(cams) >= 1, op, argument, "at least one map", [])
    checks.require_tensor(op, "image_labels", image_labels)
    checks.require(image_labels.ndim == 2, op, "image_labels", "[B,K]", image_labels)
    b, k = image_labels.shape
    device, empty = image_labels.device, 0 in (b, k)
    for i, cam in enumerate(cams):
        name = f"{argument}[{i}]"
        checks.require_floating(op, name, cam)
        shape = cam.shape
        ok = len(shape) == 4 and shape[0] == b and shape[1] == k
        checks.require(ok, op, name, lambda: f"[B,K,h,w]=[{b},{k},*,*]", cam)
        checks.require(empty or 0 not in shape[2:], op, name, "of at least 1×1 cells", cam)
        checks.require_device(op, name, cam, device)
    return k

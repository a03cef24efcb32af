"""cam_sweep: confusion matrices of CAMs against ground truth for every background threshold at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pssl_ext import checks
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, resize_stepwise

OP = "cam_sweep"
EPS = 1e-5  # added to the maximum before dividing, as SEAM and IRN do


def reference(
    cams: list[Tensor],  # N of [k_n,h_n,w_n]
    class_ids: list[Tensor],  # N of [k_n]
    ground_truth: list[Tensor],  # N of [H_n,W_n]
    thresholds: Tensor,  # [T]
    num_regions: int,
    normalize: bool,
    ignore_index: int,
) -> Tensor:  # int64 [T,C,C]
    """One histogram [ground truth, best class, thresholds below the maximum], then cumulative sums.

    With background score t a pixel is its best class if its maximum is above t; the best class does not depend on t.
    So all that a threshold can ask of a pixel is how many thresholds lie strictly below its maximum.
    """
    ordered, order = torch.where(thresholds.isnan(), torch.inf, thresholds).sort(stable=True)
    bins = len(ordered) + 1
    histogram = torch.zeros(num_regions**2 * bins, dtype=torch.int64, device=thresholds.device)
    for cam, ids, truth in zip(cams, class_ids, ground_truth, strict=True):
        best, region = _best_class(cam.to(ordered.dtype), ids, tuple(truth.shape), normalize)
        best = torch.where(best.isnan(), -torch.inf, best)  # NaN is above no threshold
        below = torch.bucketize(best, ordered)  # the number of thresholds < best
        counted = truth != ignore_index
        cells = (truth[counted].long() * num_regions + region[counted]) * bins + below[counted]
        histogram += torch.bincount(cells, minlength=len(histogram))
    histogram = histogram.view(num_regions, num_regions, bins)
    up_to = histogram.cumsum(2)[..., :-1]  # [C,C,T]: pixels whose maximum is not above threshold j
    counts = histogram.sum(2, keepdim=True) - up_to
    counts[:, 0] += up_to.sum(1)  # they are background
    return torch.empty_like(counts.movedim(2, 0)).index_copy_(0, order, counts.movedim(2, 0)).contiguous()


def _best_class(cam: Tensor, ids: Tensor, size: tuple[int, int], normalize: bool) -> tuple[Tensor, Tensor]:
    """(maximum over classes [H,W], region number of the best class [H,W]); ties go to the lowest region number."""
    if cam.shape[0] == 0 or 0 in size:  # no class: whatever the threshold, background
        nothing = torch.full(size, -torch.inf, dtype=cam.dtype, device=cam.device)
        return nothing, torch.zeros(size, dtype=torch.int64, device=cam.device)
    ids, order = ids.long().sort(stable=True)
    cam = resize_stepwise(cam[order], size)
    if normalize:
        cam = cam / (cam.amax((1, 2), keepdim=True) + EPS)
    best, index = cam.max(0)
    return best, ids[index]


def _fake(a):
    return a.thresholds.new_empty(a.thresholds.shape[0], a.num_regions, a.num_regions, dtype=torch.int64)


def _check_values(a):
    last = a.num_regions - 1
    for i, (ids, truth) in enumerate(zip(a.class_ids, a.ground_truth, strict=True)):
        bad = (ids < 1) | (ids > last)
        if bool(bad.any()):
            raise ValueError(
                f"{OP}: class_ids[{i}] must hold region numbers 1..{last}, got {ids[bad][:5].tolist()}"
            )
        bad = (truth != a.ignore_index) & ((truth < 0) | (truth > last))
        if bool(bad.any()):
            raise ValueError(
                f"{OP}: ground_truth[{i}] must hold labels 0..{last} or ignore_index={a.ignore_index}, "
                f"got {torch.unique(truth[bad])[:5].tolist()}"
            )


def power_thresholds(powers: Sequence[float]) -> list[float]:
    """The crossing points m of m = (1−m)^α: a background score (1−max)^α loses to the maximum exactly above m.

    m − (1−m)^α grows with m on [0,1], so there is one crossing; found by bisection in float64.
    """
    points = []
    for alpha in powers:
        checks.require(alpha > 0, OP, "power", "greater than 0", alpha)
        low, high = 0.0, 1.0
        while low < (middle := 0.5 * (low + high)) < high:
            low, high = (middle, high) if middle <= (1 - middle) ** alpha else (low, middle)
        points.append(low)
    return points


def _on_device(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor there, without waiting for the device; a CUDA graph keeps them as they are now."""
    if isinstance(values, Tensor) or device.type != "cuda" or torch.compiler.is_compiling():
        return torch.as_tensor(values, dtype=dtype, device=device)
    if (
        torch.cuda.is_current_stream_capturing()
    ):  # a graph holds no copy from the host; numbers travel with a launch
        return by_launches(values, torch.zeros(len(values), dtype=dtype, device=device))
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def by_launches(values: Sequence[float], zeros: Tensor) -> Tensor:
    if len(values):
        torch._foreach_add_(list(zeros.unbind()), [float(v) for v in values])
    return zeros


def _bytes_moved(cams, class_ids, ground_truth, thresholds=None, **_) -> tuple[int, int]:
    lists = [x if isinstance(x, (list, tuple)) else [x] for x in (cams, ground_truth)]
    return sum(t.numel() * t.element_size() for ts in lists for t in ts), 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(19)

    def image(
        ids: list[int], grid: tuple[int, int], size: tuple[int, int], regions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        cam = torch.rand(len(ids), *grid, generator=g, dtype=torch.float64).to(dtype).to(device)
        truth = torch.randint(0, regions, size, generator=g)
        truth[torch.rand(size, generator=g) < 0.1] = 255
        return cam, torch.tensor(ids, dtype=torch.int64, device=device), truth.to(torch.uint8).to(device)

    def case(id: str, images: list, thresholds: list[float], regions: int, **more) -> Sample:
        cams, ids, truth = (list(x) for x in zip(*images, strict=True))
        args = dict(cams=cams, class_ids=ids, ground_truth=truth, thresholds=thresholds, num_regions=regions)
        return Sample(id, {**args, **more})

    steps = [i / 20 for i in range(20)]
    yield case("one_image", [image([1, 3], (9, 8), (9, 8), 4)], steps, 4)
    ragged = [image([1], (5, 5), (20, 18), 4), image([3, 2], (4, 6), (17, 23), 4)]
    yield case("ragged_batch", ragged, steps, 4)
    yield case("normalized", ragged, steps, 4, normalize=True)
    yield case("unsorted_thresholds", [image([1, 2], (6, 6), (6, 6), 3)], [0.5, 0.1, 0.5, 0.9], 3)
    yield case("no_class", [image([], (4, 4), (8, 8), 3)], [0.2], 3)
    many = [i / 1000 for i in range(400)]
    large = [image([2, 1, 3], (11, 13), (90, 140), 4), image([1, 2], (90, 140), (90, 140), 4)]
    yield case("several_tasks", large, many, 4, normalize=True)
    odd = [image([2, 1], (1, 1), (5, 3), 3), image([1], (7, 9), (4, 5), 3), image([2], (1, 6), (1, 1), 3)]
    yield case("odd_sizes", odd, steps, 3)
    broken = [image([1, 2], (5, 6), (20, 18), 3), image([2, 1], (8, 8), (8, 8), 3)]
    for cam, _, _ in broken:
        cam[0, 2, 3], cam[1, 4, 1], cam[1, 0, 0] = torch.nan, torch.inf, -torch.inf
    yield case("not_finite", broken, [0.5, 0.2, -torch.inf, torch.inf, torch.nan], 3)
    yield case("no_threshold", [image([1], (4, 4), (4, 4), 2)], [], 2)
    power = case("power", [image([1, 2], (6, 6), (6, 6), 3)], [], 3, power=[1.0, 4.0, 8.0])
    power.args["thresholds"] = None
    yield power


@define_op(
    schema=(
        "(Tensor[] cams, Tensor[] class_ids, Tensor[] ground_truth, Tensor thresholds, SymInt num_regions, "
        "bool normalize, int ignore_index) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    check_values=_check_values,
)
def cam_sweep(
    cams: Tensor | Sequence[Tensor],  # [k,h,w], or N of them
    class_ids: Tensor | Sequence[Tensor],  # [k], or N of them
    ground_truth: Tensor | Sequence[Tensor],  # [H,W], or N of them
    thresholds: Sequence[float] | Tensor | None,  # [T]
    num_regions: int,
    *,
    power: Sequence[float] | None = None,
    normalize: bool = False,
    ignore_index: int = 255,
    backend: str = "auto",
) -> Tensor:  # int64 [T,C,C]
    """Counts (ground truth, prediction) pairs of CAMs for all T background thresholds in one go.

    For threshold t a pixel is its best class if that class's CAM > t, else background (0); equal counts as
    background, ties between classes go to the lowest region number. Peers (SEAM, IRN, PPC …) run this loop once a
    threshold over all CAM files. A pixel whose largest CAM is NaN is background.

    Args:
        cams: one image [k,h,w] of any floating type, or a list of N images of any sizes and class counts. CAMs of
            another size than the ground truth are resized to it bilinearly (``align_corners=False``), along y, then
            along x, (1−t)·a + t·b with one rounding a step: F.interpolate's last bits differ between processors, and
            a pixel at a threshold would with them.
        class_ids: [k] integer, the region number 1..num_regions-1 of each CAM; a list for a list.
        ground_truth: [H,W] integer, labels 0..num_regions-1 or ``ignore_index``; a list for a list.
        thresholds: [T] numbers in any order, duplicates allowed; compared in the CAMs' accumulation type (float32,
            float64 if any of them is). Nothing is above NaN. None where ``power`` is given.
        num_regions: C, background included.
        power: background scores (1 − max)^α instead of a threshold, one result for each α (CAMs in [0,1]; AffinityNet's
            and PSA's convention).
        normalize: divide each class by its maximum over the image (+1e-5) after resizing.
        ignore_index: ground truth that is not counted (255, PASCAL VOC's).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        int64 [T,C,C], rows ground truth, columns prediction, summed over the images. IoU of region c at threshold t is
        ``m[t,c,c] / (m[t,c,:].sum() + m[t,:,c].sum() - m[t,c,c])``. No gradient. Deterministic: integer counts.

    Raises:
        ValueError, TypeError: for shapes, types, labels or class ids out of range (values: on CPU, elsewhere with
            PSSL_DEBUG=1), thresholds together with power.
    """
    if isinstance(cams, Tensor):
        cams, class_ids, ground_truth = [cams], [class_ids], [ground_truth]
    same = len(cams) == len(class_ids) == len(ground_truth)
    lengths = (len(cams), len(class_ids), len(ground_truth))
    checks.require(same, OP, "cams, class_ids, ground_truth", "lists of one length", lengths)
    checks.require(len(cams) >= 1, OP, "cams", "at least one image", [])
    device = cams[0].device
    for i, (cam, ids, truth) in enumerate(zip(cams, class_ids, ground_truth, strict=True)):
        checks.require_floating(OP, f"cams[{i}]", cam)
        checks.require(cam.ndim == 3, OP, f"cams[{i}]", "[k,h,w]", cam)
        checks.require_integer(OP, f"class_ids[{i}]", ids)
        checks.require(
            tuple(ids.shape) == (cam.shape[0],),
            OP,
            f"class_ids[{i}]",
            lambda k=cam.shape[0]: f"[k]=[{k}]",
            ids,
        )
        checks.require_integer(OP, f"ground_truth[{i}]", truth)
        checks.require(truth.ndim == 2, OP, f"ground_truth[{i}]", "[H,W]", truth)
        filled = cam.shape[0] == 0 or 0 not in cam.shape or 0 in truth.shape
        expected = "of at least 1×1 cells where there is ground truth"
        checks.require(filled, OP, f"cams[{i}]", expected, cam)
        for name, tensor in (("cams", cam), ("class_ids", ids), ("ground_truth", truth)):
            checks.require_device(OP, f"{name}[{i}]", tensor, device)
    given = thresholds is not None
    checks.require(given or power is not None, OP, "thresholds", "given where power is not", thresholds)
    checks.require(not given or power is None, OP, "power", "None where thresholds are given", power)
    checks.require(num_regions >= 1, OP, "num_regions", "at least 1", num_regions)
    if power is not None:
        thresholds = power_thresholds(power)
    dtype = accumulation_dtype(*cams)
    thresholds = _on_device(thresholds, dtype, device)
    checks.require(thresholds.ndim == 1, OP, "thresholds", "[T]", thresholds)
    return call(
        OP,
        backend,
        cams=list(cams),
        class_ids=list(class_ids),
        ground_truth=list(ground_truth),
        thresholds=thresholds,
        num_regions=num_regions,
        normalize=normalize,
        ignore_index=ignore_index,
    )

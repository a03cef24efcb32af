"""random_walk: CAMs spread along affinities of the pixel grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pssl_ext import checks
from pssl_ext.op import Sample, call, define_op
from pssl_ext.ops._reference import accumulation_dtype, shifted

OP = "random_walk"
EDGE_SLACK = 1e-3  # resizing and averaging may leave [0,1] by a rounding; logits leave it by more


def reference(
    cams: Tensor,  # [k,h,w]
    edge: Tensor | None,  # [h,w]
    features: Tensor | None,  # [D,h,w]
    radius: int,
    beta: float,
    log2_steps: int,
) -> Tensor:  # [k,h,w]
    """2^log2_steps sparse steps instead of a dense matrix squared log2_steps times: the same by associativity.

    A step adds what changes, Σ_i a_ij (x_i − x_j) / Σ_i a_ij, so that rounding is relative to the change: hundreds of
    roundings of the values themselves would add up.
    """
    dtype = accumulation_dtype(cams, edge, features)
    cams = cams.to(dtype).contiguous()
    if cams.numel() == 0:
        return torch.empty_like(cams)
    if edge is not None:
        edge = edge.to(dtype).clamp(0, 1)
        cams = cams * (1 - edge)
        offsets = neighbours(radius)
        affinities = edge_affinities(edge, offsets, beta)
    else:
        offsets = neighbours(shrunk_radius(radius, *cams.shape[1:]))
        affinities = feature_affinities(features.to(dtype), offsets, beta)
    total = affinities.sum(0)
    for _ in range(2**log2_steps):
        pairs = zip(affinities, shifted(cams, offsets), strict=True)
        cams = cams + sum(a * (other - cams) for a, other in pairs) / total
    return cams.contiguous()


def neighbours(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy,dx) with dy² + dx² < radius², and the cell itself."""
    reach = range(1 - radius, radius)
    return [(dy, dx) for dy in reach for dx in reach if dy * dy + dx * dx < radius * radius] or [(0, 0)]


def path(dy: int, dx: int) -> list[tuple[int, int]]:
    """The cells of the box spanned by (0,0) and (dy,dx) whose squared distance to the line is < 1, ends included."""
    ys, xs = (range(min(d, 0), max(d, 0) + 1) for d in (dy, dx))
    return [(y, x) for y in ys for x in xs if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]


def edge_affinities(
    edge: Tensor,  # [h,w]
    offsets: list[tuple[int, int]],
    beta: float,
) -> Tensor:  # [N,h,w]
    """(1 − largest edge on the path)^beta; outside the map is all edge."""
    maps = []
    for offset in offsets:
        if offset == (0, 0):
            maps.append(torch.ones_like(edge))
        else:
            maps.append((1 - torch.stack(shifted(edge, path(*offset), outside=1.0)).amax(0)) ** beta)
    return torch.stack(maps)


def feature_affinities(
    features: Tensor,  # [D,h,w]
    offsets: list[tuple[int, int]],
    beta: float,
) -> Tensor:  # [N,h,w]
    """exp(−mean_d |f_i − f_j|)^beta; 0 outside the map."""
    inside = shifted(torch.ones_like(features[0]), offsets)
    maps = [
        torch.where(there > 0, (-beta * (features - other).abs().mean(0)).exp(), 0.0)
        for there, other in zip(inside, shifted(features, offsets), strict=True)
    ]
    return torch.stack(maps)


def shrunk_radius(radius: int, height: int, width: int) -> int:
    """AffinityNet's radius on a map smaller than 2·radius + 1."""
    shorter = min(height, width)
    return (shorter - 1) // 2 if shorter < 2 * radius + 1 else radius


def _fake(a):
    return a.cams.new_empty(a.cams.shape, dtype=accumulation_dtype(a.cams, a.edge, a.features))


def _check_values(a):
    if a.edge is not None:
        # not (in range) rather than (out of range): NaN is in no range
        bad = ~((a.edge >= -EDGE_SLACK) & (a.edge <= 1 + EDGE_SLACK))
        if bool(bad.any()):
            raise ValueError(f"{OP}: edge must hold values in 0..1, got {a.edge[bad][:1].tolist()}")


def _bytes_moved(cams: Tensor, edge: Tensor | None = None, *, features: Tensor | None = None, **_):
    source = edge if edge is not None else features
    result = cams.numel() * accumulation_dtype(cams, source).itemsize
    return sum(t.numel() * t.element_size() for t in (cams, source)) + result, 0


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(29)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype).to(device)

    def edges(h: int, w: int, power: float = 4.0) -> Tensor:
        """Mostly open cells: of uniform values the largest on a path is near 1 and little would walk."""
        return (torch.rand(h, w, generator=g, dtype=torch.float64) ** power).to(dtype).to(device)

    yield Sample("edges", dict(cams=rand(3, 11, 13), edge=edges(11, 13), log2_steps=3))
    yield Sample("defaults", dict(cams=rand(2, 6, 7), edge=edges(6, 7)))
    walls = (edges(9, 8, 1.0) > 0.6).to(edges(1, 1).dtype)
    yield Sample("walls", dict(cams=rand(1, 9, 8), edge=walls, radius=4, beta=1.0, log2_steps=5))
    yield Sample("many_cells", dict(cams=rand(6, 50, 61), edge=edges(50, 61), beta=2.5, log2_steps=1))
    yield Sample("map_below_radius", dict(cams=rand(2, 3, 2), edge=edges(3, 2), radius=6, log2_steps=2))
    yield Sample("row", dict(cams=rand(5, 1, 40), edge=edges(1, 40), log2_steps=2))
    yield Sample("one_cell", dict(cams=rand(2, 1, 1), edge=edges(1, 1), log2_steps=0))
    yield Sample("radius_1", dict(cams=rand(1, 4, 4), edge=edges(4, 4), radius=1, log2_steps=1))
    yield Sample("no_class", dict(cams=rand(0, 4, 5), edge=edges(4, 5)))
    yield Sample("features", dict(cams=rand(3, 12, 14), features=rand(37, 12, 14), beta=8.0, log2_steps=3))
    small = dict(cams=rand(4, 7, 9), features=rand(5, 7, 9), radius=5, log2_steps=2)
    yield Sample("features_below_radius", small)
    one = dict(cams=rand(1, 1, 1), features=rand(3, 1, 1), log2_steps=1)
    yield Sample("features_one_cell", one)


@define_op(
    schema=(
        "(Tensor cams, Tensor? edge, Tensor? features, int radius, float beta, int log2_steps) -> Tensor"
    ),
    reference=reference,
    fake=_fake,
    samples=_samples,
    bytes_moved=_bytes_moved,
    check_values=_check_values,
)
def random_walk(
    cams: Tensor,  # [k,h,w]
    edge: Tensor | None = None,  # [h,w]
    *,
    features: Tensor | None = None,  # [D,h,w]
    radius: int = 5,
    beta: float = 10.0,
    log2_steps: int = 8,
    backend: str = "auto",
) -> Tensor:  # [k,h,w]
    """Spreads the CAMs of one image over the pixel grid: 2^log2_steps steps of a random walk along affinities.

    With a_ij the affinity of cells i and j less than ``radius`` apart (dy² + dx² < radius²) and a_ii = 1, one step is
    out_j = Σ_i a_ij x_i / Σ_i a_ij; cells outside the map count for nothing. The affinities come from one of

    * ``edge``, IRN's boundary map (Ahn, Cho & Kwak 2019): a_ij = (1 − m)^beta with m the largest edge value on the path
      between i and j, the cells of the box they span that are less than 1 from the line between them, ends
      included. The CAMs are multiplied by 1 − edge first.
    * ``features``, as AffinityNet (Ahn & Kwak 2018): a_ij = exp(−mean_d |f_i − f_j|)^beta, with nothing multiplied,
      and radius (min(h,w) − 1) // 2 on maps smaller than 2·radius + 1. All pairs count, where AffinityNet's table
      leaves out those whose upper cell is within radius − 1 of the left, right or lower border.

    Peers build the transition matrix [h·w,h·w] and square it log2_steps times; this takes the same steps one by one,
    with memory for the affinities alone: (neighbours / 2)·h·w numbers. Each step adds the change it makes, so that
    rounding errors stay near those of one step.

    Args:
        cams: [k,h,w], floating, one map for each class (background too, where the method walks it).
        edge: [h,w], floating, values in 0..1 (a sigmoid's; up to 1e-3 beyond is clamped).
        features: [D,h,w], floating, D ≥ 1; exactly one of ``edge`` and ``features``.
        radius: in cells, ≥ 1 (5: IRN's and AffinityNet's; 1: no neighbours, nothing moves).
        beta: exponent of the affinities, > 0 (10: IRN's; AffinityNet uses 8).
        log2_steps: 0..30 (8: IRN's and AffinityNet's, 256 steps).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [k,h,w] in float32, float64 if any input is. No gradient. Deterministic, whatever the number of threads. NaN in
        one class stays in that class.

    Raises:
        ValueError, TypeError: for shapes, types, settings out of range, edge values out of range or NaN (values: on
            CPU, elsewhere with PSSL_DEBUG=1).
    """
    checks.require_floating(OP, "cams", cams)
    checks.require(cams.ndim == 3, OP, "cams", "[k,h,w]", cams)
    _, h, w = cams.shape
    one = (edge is None) != (features is None)
    checks.require(one, OP, "edge", "given, or else features", "both" if edge is not None else "none")
    if edge is not None:
        checks.require_floating(OP, "edge", edge)
        checks.require(tuple(edge.shape) == (h, w), OP, "edge", lambda: f"[h,w]=[{h},{w}]", edge)
        checks.require_device(OP, "edge", edge, cams.device)
    else:
        checks.require_floating(OP, "features", features)
        ok = features.ndim == 3 and tuple(features.shape[1:]) == (h, w) and features.shape[0] >= 1
        checks.require(ok, OP, "features", lambda: f"[D,h,w]=[*,{h},{w}] with D >= 1", features)
        checks.require_device(OP, "features", features, cams.device)
    checks.require(radius >= 1, OP, "radius", "at least 1", radius)
    checks.require(beta > 0, OP, "beta", "greater than 0", beta)
    checks.require(0 <= log2_steps <= 30, OP, "log2_steps", "in 0..30", log2_steps)
    return call(
        OP,
        backend,
        cams=cams,
        edge=edge,
        features=features,
        radius=radius,
        beta=float(beta),
        log2_steps=log2_steps,
    )

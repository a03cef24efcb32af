"""cam_compare in Triton. Maps are resized where their values are needed, so that no resized map exists; the maps of a
class that is not in the image are not read. A tile holds all maps of a class of an image, M the main ones before the
support ones S, as rows V [maps,pixels]; with W [maps,maps] the share of each support map in the target of each main one

    target = W V,   loss = Σ |V - W V| over the main rows,   ∂ = sign(V - W V) for them, -Wᵀ sign for the others

    products  V Vᵀ of a chunk of pixels, which the attention is made of
    loss      sums of a chunk
    signs     of V - W V: a byte a pixel and main map
    gradient  of a map's cells, gathering over the pixels that touch them
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pssl_ext.triton.cells import add_up
from pssl_ext.triton.launch import bundle, cdiv, launch, view
from pssl_ext.triton.pixels import axis_source, first_output, fraction

CHUNK = 1024  # pixels of a program
BROKEN = tl.constexpr(2)  # the sign of NaN


@triton.jit
def resized(map, size, b, k, y, x, live, H, W):
    """relu of map [B,K,h,w] at the pixels (y, x) of [H,W]; NaN stays."""
    data, sb, sk, sy, sx = map
    h, w = size
    at = data + b * sb + k * sk
    numerator, denominator = axis_source(y, h, H, False)
    cy = tl.minimum(tl.maximum(numerator, 0) // denominator, h - 1)
    numerator, denominator = axis_source(x, w, W, False)
    cx = tl.minimum(tl.maximum(numerator, 0) // denominator, w - 1)
    t, q = fraction(y, cy, h, H, False), fraction(x, cx, w, W, False)
    at += cy * sy + cx * sx
    # a cell of weight 0 is not read: at equal sizes nothing but the pixel's own cell counts
    lower, right = live & (t > 0.0), live & (q > 0.0)
    f00 = tl.load(at, mask=live, other=0.0).to(tl.float32)
    f01 = tl.load(at + sx, mask=right, other=0.0).to(tl.float32)
    f10 = tl.load(at + sy, mask=lower, other=0.0).to(tl.float32)
    f11 = tl.load(at + sy + sx, mask=lower & right, other=0.0).to(tl.float32)
    value = (1.0 - q) * ((1.0 - t) * f00 + t * f10) + q * ((1.0 - t) * f01 + t * f11)
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def all_resized(maps, sizes, b, k, p, H, W, COUNT: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr):
    """[BM,BP]: the COUNT maps at the pixels ``p`` of an image, counted row by row; 0 outside."""
    row = tl.arange(0, BM)[:, None]
    values = tl.zeros((BM, BP), tl.float32)
    for i in tl.static_range(COUNT):
        value = resized(maps[i], sizes[i], b, k, p // W, p % W, p < H * W, H, W)
        values = tl.where(row == i, value[None, :], values)
    return values


@triton.jit
def is_present(labels, b, k):
    data, sb, sk = labels
    return tl.load(data + b * sb + k * sk) != 0


@triton.jit
def products_kernel(
    maps, sizes, labels, partial, K, H, W, chunks, COUNT: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    if is_present(labels, pair // K, pair % K):
        i = tl.arange(0, BM)
        sums = tl.zeros((BM, BM), tl.float32)
        for p0 in range(first, tl.minimum(first + CHUNK, H * W), BP):
            values = all_resized(maps, sizes, pair // K, pair % K, p0 + tl.arange(0, BP), H, W, COUNT, BM, BP)
            sums += tl.sum(values[:, None, :] * values[None, :, :], 2)
        at = partial + tl.program_id(0).to(tl.int64) * BM * BM
        tl.store(at + i[:, None] * BM + i[None, :], sums)


@triton.jit
def find_shares(
    partial, pair, chunks, COSINE: tl.constexpr, MAINS: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr
):
    """W [BM,BM]: (2 - cosine)/supports or 1/supports for main rows and support columns, else 0."""
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BM)[None, :]
    shares = tl.full((BM, BM), 1.0 / (COUNT - MAINS), tl.float32)
    if COSINE:
        products = tl.zeros((BM, BM), tl.float32)
        for chunk in range(chunks):
            products += tl.load(partial + (pair * chunks + chunk) * BM * BM + i * BM + j)
        norms = tl.maximum(tl.sqrt_rn(tl.sum(tl.where(i == j, products, 0.0), 0)), 1e-8)
        cosines = products / (tl.expand_dims(norms, 1) * tl.expand_dims(norms, 0))
        shares = (2.0 - cosines) / (COUNT - MAINS)
    return tl.where((i < MAINS) & (j >= MAINS) & (j < COUNT), shares, 0.0)


@triton.jit
def differences(values, shares, MAINS: tl.constexpr, BM: tl.constexpr):
    """V - W V for the main rows, 0 for the others."""
    targets = tl.sum(shares[:, :, None] * values[None, :, :], 1)
    return tl.where(tl.arange(0, BM)[:, None] < MAINS, values - targets, 0.0)


@triton.jit
def loss_kernel(
    maps, sizes, labels, partial, sums, K, H, W, chunks, COSINE: tl.constexpr, MAINS: tl.constexpr,
    COUNT: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    sum = tl.zeros((BP,), tl.float32)
    if is_present(labels, pair // K, pair % K):
        shares = find_shares(partial, pair, chunks, COSINE, MAINS, COUNT, BM)
        for p0 in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, H * W), BP):
            values = all_resized(maps, sizes, pair // K, pair % K, p0 + tl.arange(0, BP), H, W, COUNT, BM, BP)
            sum += tl.sum(tl.abs(differences(values, shares, MAINS, BM)), 0)
    tl.store(sums + tl.program_id(0), tl.sum(sum, 0))


@triton.jit
def signs_kernel(
    maps, sizes, labels, partial, shares_out, signs, K, H, W, chunks, COSINE: tl.constexpr, MAINS: tl.constexpr,
    COUNT: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    if is_present(labels, pair // K, pair % K):
        i = tl.arange(0, BM)
        shares = find_shares(partial, pair, chunks, COSINE, MAINS, COUNT, BM)
        if chunk == 0:
            tl.store(shares_out + pair * BM * BM + i[:, None] * BM + i[None, :], shares)
        for p0 in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, H * W), BP):
            p = p0 + tl.arange(0, BP)
            values = all_resized(maps, sizes, pair // K, pair % K, p, H, W, COUNT, BM, BP)
            d = differences(values, shares, MAINS, BM)
            sign = tl.where(d > 0.0, 1, tl.where(d < 0.0, -1, tl.where(d == 0.0, 0, BROKEN)))
            at = signs + (pair * MAINS + i.to(tl.int64))[:, None] * (H * W) + p[None, :]
            tl.store(at, sign.to(tl.int8), mask=(i < MAINS)[:, None] & (p < H * W)[None, :])


@triton.jit
def gradient_kernel(
    map, size, grad, index, labels, grad_sums, shares, signs, K, H, W, MAINS: tl.constexpr, BM: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Of map ``index``: a lane a cell, which walks through the pixels that touch it."""
    h, w = size
    blocks = tl.cdiv(h * w, BP)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    b, k = pair // K, pair % K
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    inside = p < h * w
    cy, cx = p // w, p % w
    sum = tl.zeros((BP,), tl.float32)
    if is_present(labels, b, k):
        grads, grad_sb, grad_sk = grad_sums
        scale = tl.load(grads + b * grad_sb + k * grad_sk).to(tl.float32)
        y_begin, y_end = first_output(cy - 1, h, H, False), first_output(cy + 1, h, H, False)
        x_begin, x_end = first_output(cx - 1, w, W, False), first_output(cx + 1, w, W, False)
        rows = tl.max(tl.where(inside, y_end - y_begin, 0)).to(tl.int32)
        columns = tl.max(tl.where(inside, x_end - x_begin, 0)).to(tl.int32)
        for i in range(rows):
            y = y_begin + i
            wy = weight_of(y, cy, h, H)
            for j in range(columns):
                x = x_begin + j
                weight = wy * weight_of(x, cx, w, W)
                live = inside & (y < y_end) & (x < x_end) & (weight != 0.0)
                value = resized(map, size, b, k, y, x, live, H, W)
                of_pixel = tl.zeros((BP,), tl.float32)
                for s in tl.static_range(MAINS):
                    at = signs + (pair * MAINS + s) * (H * W) + y * W + x
                    code = tl.load(at, mask=live, other=0).to(tl.float32)
                    sign = tl.where(code == BROKEN, float("nan"), code)
                    if index < MAINS:
                        of_pixel += tl.where(index == s, sign, 0.0)
                    else:
                        of_pixel -= tl.load(shares + pair * BM * BM + s * BM + index) * sign
                # back through relu, whose result 0 lets nothing through
                sum += tl.where(live & ~(value <= 0.0), weight * scale * of_pixel, 0.0)
    data, sb, sk, sy, sx = grad
    to = data + b * sb + k * sk + cy.to(tl.int64) * sy + cx.to(tl.int64) * sx
    tl.store(to, sum.to(data.dtype.element_ty), mask=inside)


@triton.jit
def weight_of(out, cell, n, size):
    """The weight with which a cell enters a pixel that touches it."""
    numerator, denominator = axis_source(out, n, size, False)
    index = tl.minimum(tl.maximum(numerator, 0) // denominator, n - 1)
    share = fraction(out, index, n, size, False)
    return tl.where(index == cell, 1.0 - share, tl.where(index + 1 == cell, share, 0.0))


class _Problem:
    """The maps of both sides as kernels take them, and the products that the attention is made of."""

    def __init__(self, a: Any) -> None:
        maps, labels = [*a.main, *a.support], a.image_labels
        self.maps, self.sizes = bundle(*map(view, maps)), bundle(*(tuple(m.shape[-2:]) for m in maps))
        self.labels = view(labels.view(torch.uint8) if labels.dtype == torch.bool else labels)
        self.size, self.classes, self.pairs = (a.height, a.width), labels.shape[1], labels.numel()
        self.chunks = cdiv(a.height * a.width, CHUNK)
        self.new = labels.new_empty
        self.side = max(2, triton.next_power_of_2(len(maps)))
        self.partial = None
        if a.cosine:
            self.partial = self.new(self.pairs, self.chunks, self.side, self.side, dtype=torch.float32)
            self.run(products_kernel, COUNT=len(maps))
        self.counts = dict(COSINE=a.cosine, MAINS=len(a.main), COUNT=len(maps))

    def run(self, kernel, *made: Tensor, **counts: int) -> None:
        # a tile of maps × maps × pixels has to fit into registers
        launch(
            kernel, self.pairs * self.chunks, self.maps, self.sizes, self.labels, self.partial, *made, self.classes,
            *self.size, self.chunks, BM=self.side, CHUNK=CHUNK, BP=64 if self.side <= 8 else 16, warps=4, **counts,
        )  # fmt: skip


def forward(a: Any) -> Tensor:  # [B,K]
    problem = _Problem(a)
    sums = problem.new(problem.pairs, problem.chunks, dtype=torch.float32)
    problem.run(loss_kernel, sums, **problem.counts)
    return add_up(sums).view(a.image_labels.shape)


def backward(
    grad_sums: Tensor | None,  # [B,K]
    a: Any,
    needs: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:  # of main, support
    sides = zip((a.main, a.support), needs, strict=True)
    grads = tuple([torch.empty_like(m) for m in maps] if needed else [] for maps, needed in sides)
    if grad_sums is None:
        return tuple([g.zero_() for g in made] for made in grads)
    problem = _Problem(a)
    mains = len(a.main)
    shares = problem.new(problem.pairs, problem.side, problem.side, dtype=torch.float32)
    signs = problem.new(problem.pairs, mains, a.height * a.width, dtype=torch.int8)
    problem.run(signs_kernel, shares, signs, **problem.counts)
    for first, made in ((0, grads[0]), (mains, grads[1])):
        for i, grad in enumerate(made, first):
            h, w = problem.sizes[i]
            launch(
                gradient_kernel, problem.pairs * cdiv(h * w, 128), problem.maps[i], problem.sizes[i], view(grad), i,
                problem.labels, view(grad_sums), shares, signs, problem.classes, a.height, a.width, MAINS=mains,
                BM=problem.side, BP=128, warps=4,
            )  # fmt: skip
    return grads

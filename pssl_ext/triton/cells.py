"""Passes over the features: products with class vectors and with neighbouring cells, sums by class, and the gradient.

Class vectors are [n,C,D] float32, n = 1 or B. What stands on the feature grid is float32 in rows of cells,
[B,rows,h·w]: for each class one, then the four rows of the Gram maps (identity 1): of a cell with itself, with its
right and its lower neighbour, and the sum of the two diagonals of the square whose upper left corner it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pssl_ext.triton.arithmetic import dot
from pssl_ext.triton.launch import Features, cdiv, class_block, launch

GRAM_ROWS = 4
PRODUCT_CLASSES = 128  # that a product with class vectors takes from registers at a time


@triton.jit
def cell_offsets(p, w, sy, sx, FLAT: tl.constexpr):
    """Where cells lie, counted row by row; FLAT: at one distance."""
    if FLAT:
        return p.to(tl.int64) * sx
    return (p // w).to(tl.int64) * sy + (p % w).to(tl.int64) * sx


@triton.jit
def channels(
    cells,  # [P] pointers to the first channel
    live,  # [P]
    d,  # [N] channels
    D,
    sd,
):  # [P,N], 0 where not live
    mask = live[:, None] & (d < D)[None, :]
    return tl.load(cells[:, None] + d.to(tl.int64)[None, :] * sd, mask=mask, other=0.0)


@triton.jit
def class_vectors(vectors, c, d, C, D):
    """[D,C] or [C,D], as ``c`` and ``d`` are shaped."""
    return tl.load(vectors + c.to(tl.int64) * D + d, mask=(c < C) & (d < D), other=0.0)


# -- the maps of identity 1 --------------------------------------------------------------------------------------------


@triton.jit
def cell_maps_kernel(
    features, vectors, image, maps, C, D, h, w, DOTS: tl.constexpr, GRAM: tl.constexpr, FLAT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    data, sb, sd, sy, sx = features
    tiles = tl.cdiv(h * w, BP)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    live = p < h * w
    has_right, has_lower = live & (p % w + 1 < w), p + w < h * w
    has_both = has_right & has_lower
    here = data + b * sb + cell_offsets(p, w, sy, sx, FLAT)
    c = tl.arange(0, BC)
    z = tl.zeros((BP, BC), tl.float32)
    own = tl.zeros((BP, BD), tl.float32)
    right, lower, diagonals = own, own, own
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        f = channels(here, live, d, D, sd)
        if DOTS:
            z = dot(f, class_vectors(vectors + b * image, c[None, :], d[:, None], C, D), z)
        if GRAM:
            f = f.to(tl.float32)
            f_right = channels(here + sx, has_right, d, D, sd).to(tl.float32)
            f_lower = channels(here + sy, has_lower, d, D, sd).to(tl.float32)
            f_both = channels(here + sy + sx, has_both, d, D, sd).to(tl.float32)
            own += f * f
            right += f * f_right
            lower += f * f_lower
            diagonals += f * f_both
            # of the square's other diagonal; 0 at the last column and row, where there is no square
            diagonals += f_right * f_lower
    rows = 0
    if DOTS:
        rows = C
    gram_rows: tl.constexpr = 4 if GRAM else 0
    to = maps + b * (rows + gram_rows) * (h * w) + p
    if DOTS:
        at = to[:, None] + c.to(tl.int64)[None, :] * (h * w)
        tl.store(at, z, mask=live[:, None] & (c < C)[None, :])
    if GRAM:
        to += tl.cast(rows, tl.int64) * (h * w)
        tl.store(to, tl.sum(own, 1), mask=live)
        tl.store(to + h * w, tl.sum(right, 1), mask=live)
        tl.store(to + 2 * h * w, tl.sum(lower, 1), mask=live)
        tl.store(to + 3 * h * w, tl.sum(diagonals, 1), mask=live)


def cell_maps(f: Features, vectors: Tensor | None, gram: bool) -> Tensor:  # [B,rows,h·w]
    """The products of each cell with the class vectors, if any, and the Gram maps."""
    b, d, h, w = f.sizes
    classes = 0 if vectors is None else vectors.shape[1]
    maps = f.new(b, classes + (GRAM_ROWS if gram else 0), f.cells)
    block = class_block(classes)
    tile = 64 if block < 256 else 32
    launch(
        cell_maps_kernel, b * cdiv(f.cells, tile), f.view, vectors, image_stride(vectors), maps, classes, d, h, w,
        DOTS=vectors is not None, GRAM=gram, FLAT=f.flat, BP=tile, BC=block, BD=32,
        warps=4 if block == 32 else 8,
    )  # fmt: skip
    return maps


def image_stride(vectors: Tensor | None) -> int:
    """From the class vectors of an image to those of the next: 0 where all share one set."""
    return 0 if vectors is None or vectors.shape[0] == 1 else vectors.stride(0)


# -- sums by class -----------------------------------------------------------------------------------------------------


@triton.jit
def class_sums_kernel(
    features, shares, rows, partial, chunks, chunk, C, D, h, w, FLAT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    data, sb, sd, sy, sx = features
    blocks = tl.cdiv(D, BD)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    task = (tl.program_id(0) // blocks).to(tl.int64)
    b = task // chunks
    first = (task % chunks).to(tl.int32) * chunk
    c = tl.arange(0, BC)
    sums = tl.zeros((BD, BC), tl.float32)
    for p0 in range(first, tl.minimum(first + chunk, h * w), BP):
        p = p0 + tl.arange(0, BP)
        at = b * rows * (h * w) + c.to(tl.int64)[None, :] * (h * w) + p[:, None]
        share = tl.load(shares + at, mask=(p < h * w)[:, None] & (c < C)[None, :], other=0.0)
        # 0 · NaN is NaN: a cell that enters no sum is not read
        active = tl.max((share != 0.0).to(tl.int32), 1) != 0
        cells = data + b * sb + cell_offsets(p, w, sy, sx, FLAT)
        f = tl.load(
            cells[None, :] + d.to(tl.int64)[:, None] * sd, mask=active[None, :] & (d < D)[:, None], other=0.0
        )
        sums = dot(f, share, sums)
    to = partial + task * C * D + c.to(tl.int64)[None, :] * D + d[:, None]
    tl.store(to, sums, mask=(c < C)[None, :] & (d < D)[:, None])


def class_sums(
    f: Features,
    shares: Tensor,  # [B,rows,h·w]
    classes: int,
    images_apart: bool,
) -> Tensor:  # [B,C,D], or [1,C,D] over all images
    """For each class the sum of the features, each cell by its share: shares[b,c,i] · f[b,:,i] over the cells i."""
    b, d, h, w = f.sizes
    block = class_block(classes)
    # by the size alone, so that sums do not depend on the device
    chunk = min(1024, max(256, cdiv(cdiv(f.cells, 64), 64) * 64))
    chunks = cdiv(f.cells, chunk)
    partial = f.new(b, chunks, classes, d)
    channels = 64 if block < 256 else 32
    launch(
        class_sums_kernel, b * chunks * cdiv(d, channels), f.view, shares, shares.shape[1], partial, chunks, chunk,
        classes, d, h, w, FLAT=f.flat, BP=64 if block < 256 else 32, BC=block, BD=channels,
        warps=4 if block == 32 else 8,
    )  # fmt: skip
    groups = (b, chunks) if images_apart else (1, b * chunks)
    return add_up(partial.view(*groups, classes, d))


@triton.jit
def add_up_kernel(partial, out, parts, n, BK: tl.constexpr, BN: tl.constexpr):
    blocks = tl.cdiv(n, BN)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    sums = tl.zeros((BK, BN), tl.float32)
    for k0 in range(0, parts, BK):
        k = k0 + tl.arange(0, BK)
        at = (group * parts + k)[:, None] * n + i[None, :]
        sums += tl.load(partial + at, mask=(k < parts)[:, None] & (i < n)[None, :], other=0.0)
    tl.store(out + group * n + i, tl.sum(sums, 0), mask=i < n)


def add_up(partial: Tensor) -> Tensor:
    """[groups,parts,*] added up over the parts, in their order: [groups,*]."""
    groups, parts = partial.shape[:2]
    out = partial.new_empty(groups, *partial.shape[2:])
    if parts == 0:
        return out.zero_()
    n = out[0].numel() if groups else 0
    launch(add_up_kernel, groups * cdiv(n, 128), partial, out, parts, n, BK=8, BN=128, warps=4)
    return out


# -- the gradient of the features --------------------------------------------------------------------------------------


@triton.jit
def add_neighbour(sum, cells, share, d, D, sd):
    """``sum`` + share · f; a cell without a share is not read, whatever it holds."""
    return sum + share[:, None] * channels(cells, share != 0.0, d, D, sd).to(tl.float32)


@triton.jit
def row_at(row, p, exists):
    return tl.load(row + p, mask=exists, other=0.0)


@triton.jit
def class_shares(adjoint, p, live, c, C, cells):
    """[P,C] of the rows of the classes."""
    at = adjoint + c.to(tl.int64)[None, :] * cells + p[:, None]
    return tl.load(at, mask=live[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def feature_gradient_kernel(
    features, out, vectors, image, adjoint, C, D, h, w, NORM_ROWS: tl.constexpr, FLAT: tl.constexpr,
    FLAT_OUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    data, sb, sd, sy, sx = features
    out_data, out_sb, out_sd, out_sy, out_sx = out
    cells = h * w
    tiles = tl.cdiv(cells, BP)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    live = p < cells
    here = data + b * sb + cell_offsets(p, w, sy, sx, FLAT)
    to = out_data + b * out_sb + cell_offsets(p, w, out_sy, out_sx, FLAT_OUT)
    of_image = adjoint + b * (C + NORM_ROWS) * cells
    own_row = of_image + tl.cast(C, tl.int64) * cells
    c = tl.arange(0, BK)
    if BK == BC:
        g = class_shares(of_image, p, live, c, C, cells)
    if NORM_ROWS > 0:
        own = 2.0 * row_at(own_row, p, live)
    if NORM_ROWS > 1:
        right_row, lower_row, diagonal_row = own_row + cells, own_row + 2 * cells, own_row + 3 * cells
        left_edge, right_edge = p % w == 0, p % w == w - 1
        above, below = live & (p >= w), p + w < cells
        # the cell is right or left, lower or upper of the pair, or one of the ends of a diagonal of a square
        to_right, to_left = row_at(right_row, p, live), row_at(right_row, p - 1, live & ~left_edge)
        to_lower, to_upper = row_at(lower_row, p, live), row_at(lower_row, p - w, above)
        lower_right = row_at(diagonal_row, p, below & ~right_edge)
        lower_left = row_at(diagonal_row, p - 1, below & ~left_edge)
        upper_right = row_at(diagonal_row, p - w, above & ~right_edge)
        upper_left = row_at(diagonal_row, p - w - 1, above & ~left_edge)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        sum = tl.zeros((BP, BD), tl.float32)
        if BK == BC:
            sum = dot(g, class_vectors(vectors + b * image, c[:, None], d[None, :], C, D), sum)
        else:
            # as many classes as registers hold in three terms, read again for each run of channels
            for c0 in range(0, C, BK):
                part = class_shares(of_image, p, live, c0 + c, C, cells)
                q = class_vectors(vectors + b * image, (c0 + c)[:, None], d[None, :], C, D)
                sum = dot(part, q, sum)
        if NORM_ROWS > 0:
            sum = add_neighbour(sum, here, own, d, D, sd)
        if NORM_ROWS > 1:
            sum = add_neighbour(sum, here + sx, to_right, d, D, sd)
            sum = add_neighbour(sum, here - sx, to_left, d, D, sd)
            sum = add_neighbour(sum, here + sy, to_lower, d, D, sd)
            sum = add_neighbour(sum, here - sy, to_upper, d, D, sd)
            sum = add_neighbour(sum, here + sy + sx, lower_right, d, D, sd)
            sum = add_neighbour(sum, here + sy - sx, lower_left, d, D, sd)
            sum = add_neighbour(sum, here - sy + sx, upper_right, d, D, sd)
            sum = add_neighbour(sum, here - sy - sx, upper_left, d, D, sd)
        mask = live[:, None] & (d < D)[None, :]
        tl.store(to[:, None] + d.to(tl.int64)[None, :] * out_sd, sum.to(out_data.dtype.element_ty), mask=mask)


def feature_gradient(
    f: Features,
    vectors: Tensor,  # [n,C,D]
    adjoint: Tensor,  # [B,C + 0, 1 or 4,h·w]: the gradients of the products, of ‖f‖², of the other Gram maps
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the features from that of ``cell_maps``, in the features' layout and type."""
    b, d, h, w = f.sizes
    classes = vectors.shape[1]
    to = Features(torch.empty_like(f.tensor) if out is None else out)
    block = class_block(classes)
    tile = 64 if block < 256 else 32
    launch(
        feature_gradient_kernel, b * cdiv(f.cells, tile), f.view, to.view, vectors, image_stride(vectors), adjoint,
        classes, d, h, w, NORM_ROWS=adjoint.shape[1] - classes, FLAT=f.flat, FLAT_OUT=to.flat, BP=tile, BC=block,
        BK=block if block <= PRODUCT_CLASSES else 64, BD=32, warps=8,
    )  # fmt: skip
    return to.tensor

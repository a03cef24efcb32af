"""Passes over label pixels, for both grids. What happens at a pixel is a function BODY that an operator brings:

    BODY(extra, z, u, b, y, x, live, c, C) -> g, k, count

for P pixels (y, x) of image b, of which ``live`` exist: z [P,BC] are the products <F(x), q_c> with the class vectors,
u [P] is 1/‖F(x)‖ (1 without normalisation), c = 0..BC-1 the classes, of which those below C exist, ``extra`` the
operator's own tensors. It stores what it makes for each pixel and returns the gradients g [P,BC] of z and k [P] of
‖F(x)‖², and what is to be summed over the pixels, count [P,BC or 1]; all three 0 where a pixel does not count, though
z may be NaN there.

On the label grid z and ‖F‖² come from maps on the feature grid (identity 1). The pixels whose upper left cell is the
same lie in one square of four cells: a lane takes a square, reads its corners once, and walks through its pixels, so
that the gradients of the corners add up in registers. ``join`` puts the squares' corners together.
"""

import triton
import triton.language as tl
from torch import Tensor

from pssl_ext.triton.arithmetic import dot, inverse_norm
from pssl_ext.triton.cells import (
    GRAM_ROWS,
    PRODUCT_CLASSES,
    add_up,
    cell_offsets,
    channels,
    class_vectors,
    feature_gradient,
    image_stride,
)
from pssl_ext.triton.launch import Features, cdiv, class_block, launch


@triton.jit
def pixel_offsets(strides, b, y, x):
    sb, sy, sx = strides
    return b * sb + y.to(tl.int64) * sy + x.to(tl.int64) * sx


@triton.jit
def load_pixels(view, b, y, x, mask, other):
    """Of [B,H,W]: its values at (y, x), ``other`` where masked out."""
    data, sb, sy, sx = view
    return tl.load(data + pixel_offsets((sb, sy, sx), b, y, x), mask=mask, other=other)


@triton.jit
def store_pixels(view, b, y, x, value, mask):
    data, sb, sy, sx = view
    tl.store(data + pixel_offsets((sb, sy, sx), b, y, x), value.to(data.dtype.element_ty), mask=mask)


@triton.jit
def load_labels(regions, b, y, x, live, ignore_index, C):
    """(labels, which of them count): neither ``ignore_index`` nor out of range."""
    labels = load_pixels(regions, b, y, x, live, 0).to(tl.int64)
    return labels, live & (labels != ignore_index) & (labels >= 0) & (labels < C)


@triton.jit
def load_weights(weights, b, y, x, counts):
    """Weights as float32; 1 without, 0 where a pixel does not count, whatever stands there."""
    if weights is None:
        return counts.to(tl.float32)
    else:
        return load_pixels(weights, b, y, x, counts, 0.0).to(tl.float32)


# -- same grid ---------------------------------------------------------------------------------------------------------


@triton.jit
def same_grid_kernel(
    features, out, vectors, image, shares, share_rows, totals, total_columns, extra, eps, C, D, h, w, BODY:
    tl.constexpr, NORM: tl.constexpr, SHARE_NORM: tl.constexpr, FLAT: tl.constexpr, FLAT_OUT: tl.constexpr, TOTALS:
    tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    data, sb, sd, sy, sx = features
    cells = h * w
    tiles = tl.cdiv(cells, BP)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    live = p < cells
    here = data + b * sb + cell_offsets(p, w, sy, sx, FLAT)
    c = tl.arange(0, BC)
    z = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BD), tl.float32)
    if NORM or vectors is not None:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            f = channels(here, live, d, D, sd)
            if vectors is not None:
                z = dot(f, class_vectors(vectors + b * image, c[None, :], d[:, None], C, D), z)
            if NORM:
                squares += f.to(tl.float32) * f.to(tl.float32)
    u = live.to(tl.float32)
    if NORM:
        u = inverse_norm(tl.sum(squares, 1), eps)
    g, k, count = BODY(extra, z, u, b, p // w, p % w, live, c, C)
    if TOTALS:
        i = tl.arange(0, TOTALS)
        to = totals + tl.program_id(0).to(tl.int64) * total_columns + i
        tl.store(to, tl.sum(count, 0), mask=i < total_columns)
    if shares is not None:
        of_image = shares + b * share_rows * cells + p
        at = of_image[:, None] + c.to(tl.int64)[None, :] * cells
        tl.store(at, g, mask=live[:, None] & (c < C)[None, :])
        if SHARE_NORM:
            tl.store(of_image + tl.cast(C, tl.int64) * cells, k, mask=live)
    if out is not None:
        out_data, out_sb, out_sd, out_sy, out_sx = out
        to = out_data + b * out_sb + cell_offsets(p, w, out_sy, out_sx, FLAT_OUT)
        # f · share of it; a pixel that does not count is not read again
        counts = live & (k != 0.0)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            q = class_vectors(vectors + b * image, c[:, None], d[None, :], C, D)
            sum = dot(g, q, tl.zeros((BP, BD), tl.float32))
            if NORM:
                sum += (2.0 * k)[:, None] * channels(here, counts, d, D, sd).to(tl.float32)
            mask = live[:, None] & (d < D)[None, :]
            tl.store(
                to[:, None] + d.to(tl.int64)[None, :] * out_sd, sum.to(out_data.dtype.element_ty), mask=mask
            )


def same_grid(
    f: Features,
    vectors: Tensor | None,  # [n,C,D]
    classes: int,
    body,
    extra: tuple,
    *,
    norm: bool,
    eps: float,
    out: Tensor | None = None,  # the gradient of the features, where it is wanted
    keep: bool = False,  # whether the gradients of z are
    totals: str | None = None,  # what is summed over the pixels: "class" by class, "all" one number
) -> tuple[Tensor | None, Tensor | None]:  # [B,C or more,h·w] the gradients of z, and [B,C or 1]
    b, d, h, w = f.sizes
    block = class_block(classes)
    tile = {32: 128, 128: 64, 256: 32}[block]
    tiles = cdiv(f.cells, tile)
    columns, total_block = total_columns(totals, classes, block)
    partial = f.new(b, tiles, columns) if totals else None
    # more gradients of z than registers hold beside their three terms: the features' gradient has its own kernel
    apart = out is not None and block > PRODUCT_CLASSES
    rows = classes + int(apart and norm)
    shares = f.new(b, rows, f.cells) if keep or apart else None
    to = None if out is None or apart else Features(out)
    launch(
        same_grid_kernel, b * tiles, f.view, to.view if to else None, vectors, image_stride(vectors), shares, rows,
        partial, columns, extra, eps, classes, d, h, w, BODY=body, NORM=norm, SHARE_NORM=rows > classes,
        FLAT=f.flat, FLAT_OUT=to is not None and to.flat, TOTALS=total_block, BP=tile, BC=block, BD=32,
        warps=4 if block == 32 else 8,
    )  # fmt: skip
    if apart:
        feature_gradient(f, vectors, shares, out)
    return shares, add_up(partial) if totals else None


def total_columns(totals: str | None, classes: int, block: int) -> tuple[int, int]:
    """How many numbers are summed over the pixels, and how many a tile holds."""
    return {"class": (classes, block), "all": (1, 1), None: (0, 0)}[totals]


# -- label grid --------------------------------------------------------------------------------------------------------


@triton.jit
def axis_source(out, n, size, ALIGN: tl.constexpr):
    """(numerator, denominator) of the input coordinate that pixel ``out`` of ``size`` reads along an axis of ``n``,
    exact; below 0 where F.interpolate takes 0."""
    out = out.to(tl.int64)
    if ALIGN:
        return out * (n - 1), tl.maximum(size - 1, 1)
    else:
        return (2 * out + 1) * n - size, 2 * size


@triton.jit
def first_output(cell, n, size, ALIGN: tl.constexpr):
    """The first pixel whose upper or left cell is at least ``cell``; ``size`` where there is none."""
    cell = cell.to(tl.int64)
    if ALIGN:
        found = tl.where(size > 1, (cell * (size - 1) + n - 2) // tl.maximum(n - 1, 1), size)
    else:
        found = ((2 * cell + 1) * size + n - 1) // (2 * n)
    found = tl.where(cell >= n, size, tl.minimum(found, size))
    return tl.where(cell <= 0, 0, found)


@triton.jit
def fraction(out, cell, n, size, ALIGN: tl.constexpr):
    """The share of the cell behind ``cell``, the pixel's own; 0 at the last one, which has none behind it."""
    numerator, denominator = axis_source(out, n, size, ALIGN)
    rest = tl.maximum(numerator - cell * denominator, 0)
    return tl.where(cell < n - 1, rest.to(tl.float32) / denominator.to(tl.float32), 0.0)


@triton.jit
def label_grid_kernel(
    maps, corners, totals, total_columns, extra, eps, C, h, w, H, W, BODY: tl.constexpr, DOTS: tl.constexpr,
    NORM: tl.constexpr, ADJOINT: tl.constexpr, ADJOINT_NORM: tl.constexpr, ALIGN: tl.constexpr,
    TOTALS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    cells = h * w
    blocks = tl.cdiv(cells, BS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BS + tl.arange(0, BS)
    inside = p < cells
    cy, cx = p // w, p % w
    has_right, has_lower = inside & (cx + 1 < w), inside & (cy + 1 < h)
    has_both = has_right & has_lower
    y_begin, y_end = first_output(cy, h, H, ALIGN), first_output(cy + 1, h, H, ALIGN)
    x_begin, x_end = first_output(cx, w, W, ALIGN), first_output(cx + 1, w, W, ALIGN)
    rows = tl.max(tl.where(inside, y_end - y_begin, 0)).to(tl.int32)
    columns = tl.max(tl.where(inside, x_end - x_begin, 0)).to(tl.int32)

    dot_rows = 0
    if DOTS:
        dot_rows = C
    gram_rows: tl.constexpr = 4 if NORM else 0
    c = tl.arange(0, BC)
    if DOTS or NORM:
        at = maps + b * (dot_rows + gram_rows) * cells + p
    class_rows = c.to(tl.int64)[None, :] * cells
    classes = (c < C)[None, :]
    z00 = tl.zeros((BS, BC), tl.float32)
    z01, z10, z11 = z00, z00, z00
    if DOTS:
        dots = at[:, None] + class_rows
        z00 = tl.load(dots, mask=inside[:, None] & classes, other=0.0)
        z01 = tl.load(dots + 1, mask=has_right[:, None] & classes, other=0.0)
        z10 = tl.load(dots + w, mask=has_lower[:, None] & classes, other=0.0)
        z11 = tl.load(dots + w + 1, mask=has_both[:, None] & classes, other=0.0)
    if NORM:
        own = at + tl.cast(dot_rows, tl.int64) * cells
        s00, s01 = tl.load(own, mask=inside, other=0.0), tl.load(own + 1, mask=has_right, other=0.0)
        s10, s11 = tl.load(own + w, mask=has_lower, other=0.0), tl.load(own + w + 1, mask=has_both, other=0.0)
        right, lower, diagonal = own + cells, own + 2 * cells, own + 3 * cells
        r0, r1 = tl.load(right, mask=has_right, other=0.0), tl.load(right + w, mask=has_both, other=0.0)
        l0, l1 = tl.load(lower, mask=has_lower, other=0.0), tl.load(lower + 1, mask=has_both, other=0.0)
        both = tl.load(diagonal, mask=has_both, other=0.0)

    none = tl.zeros((BS,), tl.float32)
    # gradients of the products at the four corners, and of the nine Gram values
    g00 = tl.zeros((BS, BC), tl.float32)
    g01, g10, g11 = g00, g00, g00
    d00, d01, d10, d11, dr0, dr1, dl0, dl1, d_both = none, none, none, none, none, none, none, none, none
    if TOTALS:
        total = tl.zeros((BS, TOTALS), tl.float32)
    for i in range(rows):
        y = y_begin + i
        t = fraction(y, cy, h, H, ALIGN)
        s = 1.0 - t
        z0 = s[:, None] * z00 + t[:, None] * z10
        z1 = s[:, None] * z01 + t[:, None] * z11
        if NORM:
            # the squared norms of both columns blended along y, and their product: see bilinear.h
            a0 = s * s * s00 + t * t * s10 + 2.0 * s * t * l0
            a1 = s * s * s01 + t * t * s11 + 2.0 * s * t * l1
            a01 = s * s * r0 + t * t * r1 + s * t * both
        row_g0 = tl.zeros((BS, BC), tl.float32)
        row_g1 = row_g0
        k0, k1, k01 = none, none, none
        for j in range(columns):
            x = x_begin + j
            live = inside & (y < y_end) & (x < x_end)
            q = fraction(x, cx, w, W, ALIGN)
            r = 1.0 - q
            u = live.to(tl.float32)
            if NORM:
                u = inverse_norm(r * r * a0 + q * q * a1 + 2.0 * r * q * a01, eps)
            z = r[:, None] * z0 + q[:, None] * z1
            g, k, count = BODY(extra, z, u, b, y, x, live, c, C)
            if TOTALS:
                total += count
            if ADJOINT:
                row_g0 += r[:, None] * g
                row_g1 += q[:, None] * g
            if ADJOINT_NORM:
                k0 += r * r * k
                k1 += q * q * k
                k01 += 2.0 * r * q * k
        if ADJOINT:
            g00 += s[:, None] * row_g0
            g01 += s[:, None] * row_g1
            g10 += t[:, None] * row_g0
            g11 += t[:, None] * row_g1
        if ADJOINT_NORM:
            d00 += s * s * k0
            d01 += s * s * k1
            d10 += t * t * k0
            d11 += t * t * k1
            dl0 += 2.0 * s * t * k0
            dl1 += 2.0 * s * t * k1
            dr0 += s * s * k01
            dr1 += t * t * k01
            d_both += s * t * k01

    if TOTALS:
        n = tl.arange(0, TOTALS)
        to = totals + tl.program_id(0).to(tl.int64) * total_columns + n
        tl.store(to, tl.sum(total, 0), mask=n < total_columns)
    if ADJOINT:
        # [B,4,rows,h·w]: of each row what the square of a cell gives to its upper left, upper right, lower left and
        # lower right corner. Of the Gram maps, products stand at their upper or left cell.
        out_norm: tl.constexpr = 4 if ADJOINT_NORM else 0
        corner = (tl.cast(C, tl.int64) + out_norm) * cells
        to = corners + b * 4 * corner + p
        mask = inside[:, None] & classes
        tl.store(to[:, None] + class_rows, g00, mask=mask)
        tl.store(to[:, None] + corner + class_rows, g01, mask=mask)
        tl.store(to[:, None] + 2 * corner + class_rows, g10, mask=mask)
        tl.store(to[:, None] + 3 * corner + class_rows, g11, mask=mask)
        if ADJOINT_NORM:
            to += tl.cast(C, tl.int64) * cells
            store_corners(to, corner, d00, d01, d10, d11, inside)
            store_corners(to + cells, corner, dr0, none, dr1, none, inside)
            store_corners(to + 2 * cells, corner, dl0, dl1, none, none, inside)
            store_corners(to + 3 * cells, corner, d_both, none, none, none, inside)


@triton.jit
def store_corners(to, corner, g00, g01, g10, g11, mask):
    tl.store(to, g00, mask=mask)
    tl.store(to + corner, g01, mask=mask)
    tl.store(to + 2 * corner, g10, mask=mask)
    tl.store(to + 3 * corner, g11, mask=mask)


@triton.jit
def join_kernel(corners, out, rows, h, w, BN: tl.constexpr):
    cells = h * w
    of_image = tl.cast(rows, tl.int64) * cells
    blocks = tl.cdiv(of_image, BN)
    b = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    live = i < of_image
    y, x = i % cells // w, i % w
    at = corners + b * 4 * of_image + i
    sum = tl.load(at, mask=live, other=0.0)
    sum += tl.load(at + of_image - 1, mask=live & (x > 0), other=0.0)
    sum += tl.load(at + 2 * of_image - w, mask=live & (y > 0), other=0.0)
    sum += tl.load(at + 3 * of_image - w - 1, mask=live & (x > 0) & (y > 0), other=0.0)
    tl.store(out + b * of_image + i, sum, mask=live)


def label_grid(
    f: Features,
    maps: Tensor,  # [B,rows,h·w], see cells.cell_maps
    classes: int,
    size: tuple[int, int],
    body,
    extra: tuple,
    *,
    dots: bool,
    norm: bool,
    eps: float,
    align_corners: bool,
    adjoint: bool = False,
    adjoint_norm: bool = False,
    totals: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [B,rows,h·w] the gradients of the maps, and [B,C or 1]
    b, _, h, w = f.sizes
    block = class_block(classes)
    squares = {32: 32, 128: 8, 256: 4}[block]
    blocks = cdiv(f.cells, squares)
    rows = classes + (GRAM_ROWS if adjoint_norm else 0)
    corners = f.new(b, 4, rows, f.cells) if adjoint else None
    columns, total_block = total_columns(totals, classes, block)
    partial = f.new(b, blocks, columns) if totals else None
    launch(
        label_grid_kernel, b * blocks, maps, corners, partial, columns, extra, eps, classes, h, w, *size, BODY=body,
        DOTS=dots, NORM=norm, ADJOINT=adjoint, ADJOINT_NORM=adjoint_norm, ALIGN=align_corners,
        TOTALS=total_block, BS=squares, BC=block, warps=8,
    )  # fmt: skip
    joined = None
    if corners is not None:
        joined = f.new(b, rows, f.cells)
        launch(join_kernel, b * cdiv(rows * f.cells, 1024), corners, joined, rows, h, w, BN=1024, warps=4)
    return joined, add_up(partial) if totals else None

"""Products of float32's accuracy on the matrix units, and norms."""

import triton
import triton.language as tl


@triton.jit
def split(x):
    """Three bfloat16 terms whose sum is ``x`` to the last bit of float32; fewer for narrower types, then 0.

    A term holds 8 bits: one is all of bfloat16, two are float16's 11, three float32's 24.
    """
    first = x.to(tl.bfloat16)
    if x.dtype == tl.bfloat16:
        return first, first, first
    rest = x.to(tl.float32) - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = second
    if x.dtype == tl.float32:
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def dot(
    a,  # [M,K]
    b,  # [K,N]
    sum,  # [M,N] float32
):
    """``sum`` + a·b to the accuracy of float32, whatever the types: bfloat16 and float16 by themselves are exact,
    others in bfloat16 terms. The products of terms below 2^-24 of the whole are left out; the small ones come
    first."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, sum)
    a0, a1, a2 = split(a)
    b0, b1, b2 = split(b)
    if a.dtype == tl.float32:
        sum = tl.dot(a2, b0, sum)
    if b.dtype == tl.float32:
        sum = tl.dot(a0, b2, sum)
    if a.dtype != tl.bfloat16 and b.dtype != tl.bfloat16:
        sum = tl.dot(a1, b1, sum)
    if a.dtype != tl.bfloat16:
        sum = tl.dot(a1, b0, sum)
    if b.dtype != tl.bfloat16:
        sum = tl.dot(a0, b1, sum)
    return tl.dot(a0, b0, sum)


@triton.jit
def inverse_norm(squared, eps):
    """1/√squared, and 0 for what counts as zero. Gram maps can round to a negative square: zero as well."""
    counts = squared > eps * eps
    return tl.where(counts, 1.0 / tl.sqrt_rn(tl.where(counts, squared, 1.0)), 0.0)

"""Which layouts the samples of an operator are tested in, and in which type.

A layout meets a sample for two reasons: the sample decides the kernel's path (labels on the feature grid, finer,
coarser, several tiles), and the layout what that path reads. So each layout meets each sample, but for those in which
none of its tensors lies otherwise than contiguous (an empty batch, one pixel). The type decides how values are
loaded and how many fit into a vector, which is a matter of path and type, or of layout and type, and not of all three
together: each sample meets each type, and each layout does, but a sample in a layout is tested in one type only. What
kind of fault is left: one that needs a sample's path, a layout and a type at once.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pssl_ext.testing import LAYOUTS, samples


@functools.cache
def pairwise(op: str, device: str, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, list[tuple[str, str]]]:
    """Return for each type the pairs (sample, layout) to test in it; the contiguous layout is in none of them.

    A pair takes the type that its layout has met least, and of these the one that its sample has.
    """
    found: dict[torch.dtype, list[tuple[str, str]]] = {dtype: [] for dtype in dtypes}
    met: Counter[tuple[str, torch.dtype]] = Counter()
    for number, sample in enumerate(samples(op, device, torch.float32, "contiguous")):
        for layout in layouts_of(op, device, number):
            dtype = min(dtypes, key=lambda d, x=layout, s=sample.id: (met[x, d], met[s, d]))
            found[dtype].append((sample.id, layout))
            met.update({(layout, dtype): 1, (sample.id, dtype): 1})
    return found


def layouts_of(op: str, device: str, number: int) -> list[str]:
    """Return the layouts in which some tensor of the operator's sample lies otherwise than contiguous."""
    plain = _places(samples(op, device, torch.float32, "contiguous")[number].args)
    return [
        layout
        for layout in LAYOUTS
        if _places(samples(op, device, torch.float32, layout)[number].args) != plain
    ]


def _places(args: dict) -> list[tuple]:
    """Offset and strides of each tensor that holds something, along the dimensions of more than one element."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.numel()]
    return [
        (x.storage_offset(), *(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)) for x in tensors
    ]

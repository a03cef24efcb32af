"""Labels out of range where kernels cannot raise: on a GPU, whose results nobody waits for, they count as ignored.

On the CPU the kernels raise (test_op_errors.py), so there is nothing to run here but where the CUDA kernels are.
"""

import sys

import pytest
import torch

from pssl_ext.registry import OPS
from pssl_ext.testing import assert_same_bits, run

DEVICES = ["cuda"] if torch.cuda.is_available() else []
DEVICES += ["cpu"] if "cuda_on_cpu" in sys.modules else []
pytestmark = pytest.mark.skipif(not DEVICES, reason="no CUDA kernels to run")

BAD = [3, 4, 100, -1, -100]


def labels(dtype, device):
    """[2,9,11] with a tenth of the pixels ignored; and the same with labels out of range in their place."""
    g = torch.Generator().manual_seed(7)
    sound = torch.randint(0, 3, (2, 9, 11), generator=g)
    ignored = torch.rand(sound.shape, generator=g) < 0.1
    info = torch.iinfo(dtype)
    bad = [b for b in (*BAD, info.max - 1, info.min) if info.min <= b <= info.max and not 0 <= b < 3]
    values = torch.tensor(bad)[torch.randint(0, len(bad), sound.shape, generator=g)]
    pair = sound.where(~ignored, 127), sound.where(~ignored, values)
    return [t.to(dtype).to(device) for t in pair]


def arguments(op, regions):
    g = torch.Generator().manual_seed(8)
    device = regions.device
    if op == "cam_sweep":
        cams = [torch.rand(2, 5, 6, generator=g).to(device) for _ in regions]
        ids = [torch.tensor([1, 2], device=device) for _ in regions]
        return dict(cams=cams, class_ids=ids, ground_truth=list(regions), thresholds=[0.3, 0.6])
    features = torch.randn(2, 4, 5, 6, generator=g).to(device)
    if op == "prototype_contrast":
        prototypes = torch.randn(3, 4, generator=g).to(device)
        return dict(features=features, prototypes=prototypes, regions=regions)
    return dict(features=features, regions=regions)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["cam_sweep", "prototype_pool", "prototype_contrast"])
def test_a_label_out_of_range_is_ignored(op, device, dtype, monkeypatch):
    monkeypatch.delenv("PSSL_DEBUG", raising=False)
    more = dict(ignore_index=127) | ({} if op == "prototype_contrast" else dict(num_regions=3))
    sound, bad = (run(OPS[op], arguments(op, regions) | more, "native") for regions in labels(dtype, device))
    assert_same_bits(bad, sound, op)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [0, 3, 1000, -5])
def test_cam_sweep_leaves_out_a_class_out_of_range(device, wrong, monkeypatch):
    monkeypatch.delenv("PSSL_DEBUG", raising=False)
    g = torch.Generator().manual_seed(9)
    cams = torch.rand(3, 5, 6, generator=g).to(device)
    truth = torch.randint(0, 3, (9, 11), generator=g).to(device)
    more = dict(ground_truth=truth, thresholds=[0.3, 0.6], num_regions=3)
    ids = torch.tensor([1, wrong, 2], device=device)
    got = run(OPS["cam_sweep"], dict(cams=cams, class_ids=ids, **more), "native")
    expected = run(OPS["cam_sweep"], dict(cams=cams[::2], class_ids=ids[::2], **more), "native")
    assert_same_bits(got, expected, "cam_sweep")

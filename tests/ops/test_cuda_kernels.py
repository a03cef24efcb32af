"""What the CUDA kernels do otherwise than those on the CPU: they cannot raise for the values they find, and the lists
that they take have to fit into a launch. Nothing to run where neither a GPU nor its stand-in is (tests/cuda).
"""

import ctypes
import sys

import pytest
import torch
from support import prototype_args
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pssl_ext.op import OPS
from pssl_ext.testing import assert_same_bits, check_args, run

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


def native(op, **args):
    return run(OPS[op], args, "native")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["cam_sweep", "prototype_pool", "prototype_contrast"])
def test_a_label_out_of_range_is_ignored(op, device, dtype, monkeypatch):
    """No result may wait for the device, so a label that is none counts as ignored, forward and backward."""
    monkeypatch.delenv("PSSL_DEBUG", raising=False)
    more = dict(ignore_index=127) | ({} if op == "prototype_contrast" else dict(num_regions=3))
    sound, bad = (native(op, **arguments(op, regions), **more) for regions in labels(dtype, device))
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
    got = native("cam_sweep", cams=cams, class_ids=ids, **more)
    expected = native("cam_sweep", cams=cams[::2], class_ids=ids[::2], **more)
    assert_same_bits(got, expected, "cam_sweep")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [False, True])
def test_cam_sweep_takes_more_images_than_a_launch(device, normalize):
    g = torch.Generator().manual_seed(10)
    sizes = [(1 + i % 7, 1 + i % 5) for i in range(150)]
    args = dict(
        cams=[torch.rand(1 + i % 3, 2, 3, generator=g).to(device) for i in range(150)],
        class_ids=[torch.randperm(3, generator=g)[: 1 + i % 3].add(1).to(device) for i in range(150)],
        ground_truth=[torch.randint(0, 4, size, generator=g).to(device) for size in sizes],
    )
    more = dict(thresholds=[0.7, 0.2, 0.4], num_regions=4, normalize=normalize)
    got = native("cam_sweep", **args, **more)
    assert_same_bits(got, run(OPS["cam_sweep"], args | more, "reference"), "cam_sweep")


def launched(device, op, **args):
    """How many of our kernels forward and backward of a call launch."""
    native(op, **args)  # what happens once has happened
    if device == "cpu":
        counter = ctypes.CDLL(sys.modules["pssl_ext._C"].__file__).cuda_on_cpu_launched
        counter.restype = ctypes.c_long
        before = counter()
        native(op, **args)
        return counter() - before
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        native(op, **args)
        torch.cuda.synchronize()
    names = [e.name for e in found.events() if e.device_type == DeviceType.CUDA]
    return sum("at::native" not in name and not name.startswith("Mem") for name in names)


@pytest.mark.parametrize("device", DEVICES)
def test_cam_compare_launches_two_kernels_forward_and_two_backward(device):
    g = torch.Generator().manual_seed(13)
    maps = [torch.rand(3, 4, n, n, generator=g).to(device) for n in (4, 8, 16, 4, 8, 12, 16)]
    args = dict(main=maps[:3], support=maps[3:], image_labels=torch.ones(3, 4, device=device), size=(8, 8))
    assert launched(device, "cam_compare", **args) == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "size, main, support",
    [
        ((40, 75), [(2, 3), (33, 70)], [(1, 1), (40, 75)]),  # a cell is touched by many tiles of pixels
        ((5, 6), [(150, 180), (2, 2)], [(70, 3)]),  # more cells than the sums of a tile's part have room for
    ],
    ids=["coarse", "fine"],
)
def test_cam_compare_on_cells_of_any_size(size, main, support, device):
    """Coarse and fine maps side by side; planes of zeros of several pieces and off every alignment."""
    g = torch.Generator().manual_seed(17)
    args = {"main": main, "support": support}
    args = {n: [torch.randn(3, 3, *s, generator=g).to(device) for s in sizes] for n, sizes in args.items()}
    args["image_labels"] = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 0]], device=device)
    check_args(OPS["cam_compare"], dict(args, size=size), "native", f"cam_compare at {size}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, launches", [("prototype_pool", 5 + 2), ("prototype_contrast", 3 + 4)])
def test_on_the_feature_grid_a_launch_passes_over_the_features(op, launches, device):
    """Forward and backward each; sums over cells, the pool's and the gradients of prototypes, take another. The rest is
    as small as class vectors."""
    g = torch.Generator().manual_seed(15)
    args = dict(features=torch.randn(2, 24, 9, 11, generator=g), regions=torch.randint(0, 5, (2, 9, 11)))
    args["prototypes" if op == "prototype_contrast" else "weights"] = torch.rand(
        (5, 24) if op == "prototype_contrast" else (2, 9, 11), generator=g
    )
    args = {name: tensor.to(device) for name, tensor in args.items()}
    if op == "prototype_pool":
        args["num_regions"] = 5
    assert launched(device, op, **args) == launches


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("images", [1, 5, 64])
def test_cam_sweep_counts_all_images_in_a_launch(images, device):
    """Beside it one that begins and one that ends; one for the maxima, again of all images, where they are wanted."""
    g = torch.Generator().manual_seed(14)
    args = dict(
        cams=[torch.rand(1 + i % 3, 3 + i, 4, generator=g).to(device) for i in range(images)],
        class_ids=[torch.arange(1, 2 + i % 3, device=device) for i in range(images)],
        ground_truth=[torch.randint(0, 4, (5, 2 + i), generator=g).to(device) for i in range(images)],
        thresholds=torch.linspace(0, 1, 7, device=device),
        num_regions=4,
    )
    assert launched(device, "cam_sweep", **args) == 3
    assert launched(device, "cam_sweep", **args, normalize=True) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_maps_as_a_launch_takes(device):
    g = torch.Generator().manual_seed(11)
    maps = [torch.rand(1, 2, 1 + i % 4, 2 + i % 3, generator=g).to(device) for i in range(25)]
    more = dict(image_labels=torch.ones(1, 2, device=device), size=(5, 6))
    check_args(OPS["cam_regions"], dict(cams=maps[:24], **more), "native", "cam_regions, 24 maps")
    check_args(
        OPS["cam_compare"], dict(main=maps[:3], support=maps[3:24], **more), "native", "cam_compare, 24 maps"
    )
    words = "the CUDA kernel takes at most 24 maps in all, got 25"
    with pytest.raises(RuntimeError, match=f"cam_regions: cams: {words}"):
        native("cam_regions", cams=maps, **more)
    with pytest.raises(RuntimeError, match=f"cam_compare: support: {words}"):
        native("cam_compare", main=maps[:3], support=maps[3:], **more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(9, 11), (20, 24)])
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_more_classes_than_a_pass(op, size, device):
    """171 classes (COCO-Stuff's): several passes over channels and cells, and on the feature grid more of them than
    small devices hold for a tile of cells."""
    g = torch.Generator().manual_seed(12)
    features = torch.randn(2, 40, 9, 11, generator=g)
    regions = torch.randint(0, 171, (2, *size), generator=g)
    args = prototype_args(op, features, regions, 171, g, device)
    check_args(OPS[op], args, "native", f"{op}, 171 classes on {size}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(3, 5), (6, 7)])
@pytest.mark.parametrize("op", ["prototype_pool", "prototype_contrast"])
def test_as_many_channels_as_resnet38(op, size, dtype, device):
    """4096, channels last: more than any chunk, and on the feature grid more sums than a block keeps."""
    g = torch.Generator().manual_seed(16)
    features = torch.randn(1, 4096, 3, 5, generator=g).to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    regions = torch.zeros(1, *size).long()
    regions[0, :2] = torch.tensor([[1], [255]])
    args = prototype_args(op, features, regions, 2, g, device, weighted=False)
    check_args(OPS[op], args, "native", f"{op}, 4096 channels on {size}")

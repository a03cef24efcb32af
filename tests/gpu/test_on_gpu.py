"""What `make test-gpu` keeps of the operators' tests, seen without a GPU."""

from types import SimpleNamespace

import on_gpu
import pytest

from pssl_ext import dispatch
from pssl_ext.testing import Case


class Item:
    """What the plugin asks of a test."""

    def __init__(self, name, reason=None, gpu=False, **params):
        self.name, self.callspec = name, SimpleNamespace(params=params)
        self.markers = {"skip": SimpleNamespace(kwargs=dict(reason=reason))} if reason else {}
        self.markers |= {"gpu": True} if gpu else {}

    def get_closest_marker(self, name):
        return self.markers.get(name)


CONFIG = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
STAYS = [
    Item("t[cam_sweep-one_image-native-cuda]", case=Case("cam_sweep", "one_image", "native", "cuda")),
    Item("t[pool-cuda]", device="cuda"),
    Item("t[prototype_pool-triton-cuda]", "triton on cuda: triton is not installed", case=None),
    Item("test_large", gpu=True),
]
GOES = [
    Item("t[cam_sweep-one_image-native-cpu]", case=Case("cam_sweep", "one_image", "native", "cpu")),
    Item("t[cpu-cuda_like]", device="cpu"),
    Item("t[cam_sweep-triton-cuda]", "this version holds no Triton kernel for cam_sweep", case=None),
    Item("t[prototype_pool-triton-cuda-torch.float64]", "float32, and an argument is float64", case=None),
    Item("t[prototype_pool-triton-cpu]", "Triton kernels run on CUDA devices", case=None),
    Item("test_words"),
]


def test_the_tests_on_a_gpu_stay(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    items = [*STAYS, *GOES]
    on_gpu.pytest_collection_modifyitems(CONFIG, items)
    assert items == STAYS


def test_a_build_without_cuda_kernels_is_no_build(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda spec, *_: f"no cuda kernel for {spec.name}")
    with pytest.raises(pytest.UsageError, match="no cuda kernel for prototype_pool"):
        on_gpu.pytest_collection_modifyitems(CONFIG, list(STAYS))

"""Large results on the CPU lie in ordinary memory; where it is asked for, in memory that is kept from one to the next
(csrc/common/kept_memory.h)."""

import sys
import threading

import pytest
import torch
from new_python import in_new_python

from pssl_ext import keep_memory, prototype_contrast, prototype_pool, release_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "pssl_ext._C" not in sys.modules,
    reason="memory is kept on Linux, by the native kernels",
)

C, D, SIDE = 5, 32, 192
BYTES = 4 * D * SIDE * SIDE  # 4.5 MiB
MIB = 2**20


@pytest.fixture(autouse=True)
def memory_is_kept():
    """And nothing of another test's."""
    release_memory()
    keep_memory(1024)
    yield
    keep_memory(0)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(1, D, SIDE, SIDE, generator=g)
    return features, torch.randn(C, D, generator=g), torch.randint(0, C, (1, SIDE, SIDE), generator=g)


def gradient(features: torch.Tensor, prototypes: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    features = features.detach().requires_grad_()
    prototype_contrast(features, prototypes, regions, backend="native").backward()
    return features.grad


def pool_gradient(features: torch.Tensor, prototypes: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    features = features.detach().requires_grad_()
    pooled, _ = prototype_pool(features, regions, C, backend="native")
    (pooled[0] * prototypes).sum().backward()
    return features.grad


def test_the_next_gradient_takes_what_was_freed():
    arguments = inputs()
    first = gradient(*arguments)
    where = first.data_ptr()
    assert release_memory() == 0  # it is in use
    del first
    again = gradient(*arguments)
    assert again.data_ptr() == where
    del again
    assert BYTES <= release_memory() < BYTES + 2 * MIB
    assert release_memory() == 0


def test_results_in_use_do_not_share_memory():
    results = [(gradient(*inputs(seed)), gradient(*inputs(seed)).clone()) for seed in range(4)]
    assert len({found.data_ptr() for found, _ in results}) == 4
    for found, copy in results:
        assert torch.equal(found, copy)


@pytest.mark.parametrize("function", [gradient, pool_gradient])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_of_what_lay_there_is_in_the_result(function, memory_format):
    features, prototypes, regions = inputs()
    features = features.contiguous(memory_format=memory_format)
    regions[0, :3] = 255
    found = function(features, prototypes, regions)
    assert found.stride() == features.stride()
    where, copy = found.data_ptr(), found.clone()
    found.fill_(torch.nan)
    del found
    again = function(features, prototypes, regions)
    assert again.data_ptr() == where
    assert torch.equal(again, copy)


def test_much_smaller_results_leave_large_memory_alone():
    features, prototypes, regions = inputs()
    large = gradient(features.repeat(4, 1, 1, 1), prototypes, regions.repeat(4, 1, 1))
    where = large.data_ptr()
    del large
    small = gradient(features, prototypes, regions)
    assert small.data_ptr() != where
    assert 4 * BYTES <= release_memory() < 4 * BYTES + 2 * MIB


def test_threads_at_once():
    expected = [gradient(*inputs(seed)).clone() for seed in range(4)]
    wrong = []

    def work(seed: int) -> None:
        arguments = inputs(seed)
        for _ in range(8):
            if not torch.equal(gradient(*arguments), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def freed_by_resizing(tensor: torch.Tensor) -> bool:
    """Whether code that frees a tensor's memory after the forward pass can."""
    try:
        tensor.untyped_storage().resize_(0)
    except RuntimeError as error:
        assert "not resizable" in str(error)
        return False
    return tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("function", [gradient, pool_gradient])
def test_by_default_storages_are_resized(function):
    keep_memory(0)
    found = function(*inputs())
    assert freed_by_resizing(found)
    del found
    assert release_memory() == 0


def test_what_is_kept_is_not_resized():
    found = gradient(*inputs())
    assert not freed_by_resizing(found)
    assert found.isfinite().all()


def test_results_above_the_limit_are_ordinary():
    keep_memory(4)
    found = gradient(*inputs())  # 4.5 MiB
    assert freed_by_resizing(found)


def test_switched_off_it_gives_back_what_is_free_and_then_the_rest():
    used, freed = gradient(*inputs(0)), gradient(*inputs(1))
    copy = used.clone()
    del freed
    keep_memory(0)
    assert release_memory() == 0
    assert torch.equal(used, copy)
    del used
    assert release_memory() == 0


def test_a_smaller_limit_gives_back_the_oldest():
    results = [gradient(*inputs(seed)) for seed in range(3)]  # 6 MiB each, in huge pages
    results.clear()
    keep_memory(13)
    assert release_memory() == 12 * MIB


@pytest.mark.parametrize("mib", [-1, 10**9, 1.5, "64", True, None])
def test_a_limit_is_an_integer(mib):
    with pytest.raises(ValueError, match=r"keep_memory: mib must be an integer from 0 to 999999999, got "):
        keep_memory(mib)


FREED = """
import torch
from pssl_ext import prototype_pool, release_memory

for images in (1, 2, 1):
    features = torch.randn(images, 32, 192, 192, requires_grad=True)
    regions = torch.zeros(images, 192, 192, dtype=torch.int64)
    prototype_pool(features, regions, 1)[0].sum().backward()
    del features
print(release_memory() >> 20)
"""


@pytest.mark.parametrize(("keep", "kept"), [("0", 0), ("6", 6), ("10", 6), ("1024", 16), ("", 0)])
def test_no_more_is_kept_than_asked_for(keep, kept):
    """Blocks of 6, 10 and 6 MiB: the oldest goes where there is no room for both. Without a limit nothing is kept."""
    done = in_new_python(FREED, PSSL_KEEP_MIB=keep)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kept


RESIZED = """
import torch
from pssl_ext import prototype_pool

features = torch.randn(1, 32, 192, 192, requires_grad=True)
prototype_pool(features, torch.zeros(1, 192, 192, dtype=torch.int64), 1)[0].sum().backward()
features.grad.untyped_storage().resize_(0)
"""


@pytest.mark.parametrize(("keep", "resized"), [("", True), ("0", True), ("64", False)])
def test_who_asks_for_nothing_gets_ordinary_memory(keep, resized):
    done = in_new_python(RESIZED, PSSL_KEEP_MIB=keep)
    assert (done.returncode == 0) == resized, done.stderr
    assert resized or "not resizable" in done.stderr


@pytest.mark.parametrize("keep", ["-1", "much"])
def test_a_limit_that_is_no_number_fails_the_import(keep):
    done = in_new_python("import pssl_ext", PSSL_KEEP_MIB=keep)
    assert done.returncode != 0
    assert f"PSSL_KEEP_MIB must be a number of MiB, 0 for none, got '{keep}'" in done.stderr

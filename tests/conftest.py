"""For every test: the same random numbers and hypothesis examples each time, so that a failure is one for everybody;
the photographs where they are."""

import os
import random
from pathlib import Path

import hypothesis
import pytest

# Before torch is loaded. The tests' tensors are small, and .ci/run runs other things beside them; tests of what several
# threads may change set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile("pssl", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("pssl")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole",
        action="store_true",
        help="every layout of the operators' samples in every type, and over emulated kernels all of their tests",
    )


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever ran before it, and alone as among others."""
    import numpy  # these two not before the number of their threads is set
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """VOC2012mini: $PSSL_VOC, or ../shared/data/VOC2012mini beside the repository."""
    root = Path(os.environ.get("PSSL_VOC", REPOSITORY.parent / "shared/data/VOC2012mini"))
    if not (root / "JPEGImages").is_dir():
        pytest.skip(f"no photographs: set PSSL_VOC to a VOC 2012 folder ({root} is none)")
    return root

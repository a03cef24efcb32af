"""Tests marked `gpu` run where torch sees a GPU, and elsewhere are skipped with that reason. `make test-gpu` runs them
and the operators' own tests on such a machine, and fails where there is none."""

import sys
from pathlib import Path

import pytest
import torch

# the operators' cases, which hold the problems at the size of training
sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="GPU: torch sees none here"))

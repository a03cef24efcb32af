"""Puts this folder on the path: its modules are also a pytest plugin and a script, so that it is no package."""

import platform
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build


@pytest.fixture(autouse=True, scope="session")
def needed():
    if platform.machine() != "x86_64":
        pytest.skip("cuda_on_cpu.h is written for x86-64")
    if not build.sanitizers_found():
        pytest.skip("the compiler has no libasan and libubsan")

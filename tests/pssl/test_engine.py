"""Checkpoints, the resumable loop, schedules and seeding."""

import math

import pytest
import torch
import torch.nn.functional as F

from pssl.config.model import ModelConfig
from pssl.config.optimizer import EngineConfig, ScheduleConfig
from pssl.core import checkpoint, files
from pssl.core.seeding import generator
from pssl.inputs.images import ImageInputs
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.method.terms.registry import MethodConfig
from pssl.models.build import build_cam_net
from pssl.models.cam_net import CamNet
from pssl.models.prototypes import Prototypes
from pssl.training.cam import CamTraining
from pssl.training.loop import epoch_batches, run_training
from pssl.training.optimizer import build_optimizer, head_layers, lr_share


def make_stage(state_path=None, epochs=3) -> CamTraining:
    torch.manual_seed(0)
    net = build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0), 3)
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), generator=source, dtype=torch.uint8)
    labels = (torch.rand(9, 3, generator=source) < 0.5).float()
    inputs = ImageInputs([f"i{n}" for n in range(9)], images, labels, net.backbone.normalise, (1, 1.3), "cpu")
    schedule = ScheduleConfig(batch_size=4)
    objective = Objective(MethodConfig(), ("rcm", "mam"), classes=3, dim=8, size=16)
    return CamTraining(
        "arm", "arm", net, SupportNet(net), objective, inputs, epochs, 1e-3, schedule, 5, state_path
    )


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save_weights(path, {"x": torch.ones(2)}, {"n": 1})

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    tensors, description = checkpoint.load_weights(path)
    assert tensors["x"].tolist() == [1, 1] and description == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_foreign_and_missing_checkpoints_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: expected a pssl-checkpoint-1"):
        checkpoint.load_weights(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(ValueError, match=r"text.safetensors: expected a pssl-checkpoint-1 file, got none of"):
        checkpoint.load_weights(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none.safetensors"):
        checkpoint.load_weights(tmp_path / "none.safetensors")


def test_training_state_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load_state(tmp_path / "bad.pt")


def prototypes_of(net):
    """Prototypes that depend on the network as it is, as those of pssl.train do."""
    rows = torch.cat([net.classifier.weight.new_ones(1, 8), net.classifier.weight[:, :, 0, 0]])
    valid = torch.ones(len(rows), dtype=torch.bool)
    return Prototypes(F.normalize(rows.detach(), dim=1), valid, 0.5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stop", "refresh_epochs", "mam_from"), [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)])
def test_resumed_at_any_step_equals_uninterrupted(tmp_path, stop, refresh_epochs, mam_from):
    """Weights, SupportNet, prototype memory and losses to the bit, with dropout, accumulation, clipping and a best."""

    def stage(path=None):
        made = make_stage(path, epochs=2)
        made.net.dropout.p, made.schedule.warmup = 0.5, 0.5
        made.objective.config.mam.from_epoch = mam_from
        made.engine = EngineConfig(save_every=1, accumulate=2, clip_norm=0.5)
        made.objective.config.rcm.refresh_epochs = refresh_epochs
        made.prototypes = lambda: prototypes_of(made.net)
        return made

    def remember(stage):
        return lambda epoch: stage.best.update(epoch=epoch)

    whole = stage()
    run_training(whole, on_epoch=remember(whole))
    assert whole.objective.rcm.anchored == (refresh_epochs > 0)
    assert [step["epoch"] >= mam_from for step in whole.history] == ["mam" in step for step in whole.history]
    path = tmp_path / "state.pt"

    def interrupt(values):
        if values["step"] == stop:
            raise Stopped

    torch.manual_seed(99)  # the global generator has no say
    with pytest.raises(Stopped):
        interrupted = stage(path)
        run_training(interrupted, on_step=interrupt, on_epoch=remember(interrupted))
    resumed, steps = stage(path), []
    if stop:  # make sure that nothing is left from before
        with torch.no_grad():
            resumed.net.embed.weight.fill_(7.0)
    run_training(
        resumed, resume=True, on_step=lambda values: steps.append(values["step"]), on_epoch=remember(resumed)
    )
    assert steps == list(range(stop, 4)) and resumed.history == whole.history
    assert resumed.best == whole.best == {"epoch": 1}
    for stage_part in ("net", "support", "objective"):
        expected = getattr(whole, stage_part).state_dict()
        for name, value in getattr(resumed, stage_part).state_dict().items():
            assert torch.equal(value, expected[name]), (stage_part, name)
    assert whole.objective.rcm.memory.pushed.sum() > 0
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_parts_of_a_batch_add_up():
    """Gradients over parts are those of the batch (classification with fixed norms: nothing couples the images)."""
    stages = [make_stage(epochs=1) for _ in range(2)]
    for stage, count in zip(stages, (1, 3), strict=True):
        stage.objective, stage.support = Objective(MethodConfig(), (), classes=3, dim=8, size=16), None
        stage.net = build_like(stage.net)
        stage.engine = EngineConfig(accumulate=count)
        run_training(stage)
    for one, three in zip(*(stage.net.parameters() for stage in stages), strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
    assert [h["total"] for h in stages[0].history] == pytest.approx(
        [h["total"] for h in stages[1].history], 1e-4
    )


def build_like(net: CamNet) -> CamNet:
    """The same network with fixed norms."""
    fixed = CamNet(net.backbone, net.classes, net.dim, logit_scale=net.logit_scale, fixed="norms")
    fixed.load_state_dict(net.state_dict())
    return fixed


def test_clipping_bounds_the_gradient():
    stage = make_stage(epochs=1)
    stage.schedule.optimizer, stage.schedule.warmup, stage.schedule.poly_power = "sgd", 0.0, 0.0
    stage.schedule.head_lr_factor, stage.schedule.weight_decay, stage.lr = 1.0, 0.0, 1.0
    stage.engine = EngineConfig(clip_norm=1e-3)
    before = [p.detach().clone() for p in stage.net.parameters()]
    run_training(stage)
    moved = (
        sum(
            float((p - b).detach().square().sum())
            for p, b in zip(stage.net.parameters(), before, strict=True)
        )
        ** 0.5
    )
    assert 0 < moved < 2.01e-3  # two steps


@pytest.mark.parametrize("engine", [EngineConfig(precision="bf16"), EngineConfig(compile="eager")])
def test_precision_and_compilation_change_little(engine):
    plain, other = make_stage(epochs=1), make_stage(epochs=1)
    other.engine = engine
    run_training(plain)
    run_training(other)
    for first, second in zip(plain.history, other.history, strict=True):
        assert second["total"] == pytest.approx(first["total"], rel=0.1)
        assert (first == second) == (engine.precision == "auto")


def test_losses_are_not_computed_in_less_precision():
    watched, stage = [], make_stage(epochs=1)
    stage.objective = Objective(MethodConfig(), ("rcm", "mam"), classes=3, dim=8, size=16)

    def watch(term, arguments, loss):
        watched.append((torch.is_autocast_enabled("cpu"), arguments[0].main[1.0].cam.dtype, loss.dtype))

    for term in stage.objective.terms.values():
        term.register_forward_hook(watch)
    stage.engine = EngineConfig(precision="bf16")
    run_training(stage)
    assert watched[:3] == [(False, torch.bfloat16, torch.float32)] * 3
    assert stage.objective.rcm.memory.rows.dtype == torch.float32


def test_engine_options_that_cannot_be():
    stage = make_stage(epochs=1)
    stage.engine = EngineConfig(precision="fp16")
    with pytest.raises(ValueError, match=r"engine\.precision: fp16 needs CUDA, got device cpu"):
        run_training(stage)
    stage.engine = EngineConfig(accumulate=5)
    with pytest.raises(
        ValueError, match="at least one image for each of 1 ranks and 5 parts, got a batch of 4"
    ):
        run_training(stage)
    stage.engine = EngineConfig(compile="eager")
    stage.net.frozen = True
    with pytest.raises(ValueError, match=r"engine\.compile: expected a backbone that is trained"):
        run_training(stage)


def test_same_seed_same_numbers():
    first, second = make_stage(), make_stage()
    losses = ([], [])
    for stage, taken in zip((first, second), losses, strict=True):
        run_training(stage, on_step=taken.append)
    assert losses[0] == losses[1]
    assert all(
        torch.equal(a, b) for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True)
    )


def test_not_finite_is_an_error():
    stage = make_stage()
    with torch.no_grad():
        stage.net.classifier.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="training arm, step 0: losses must be finite"):
        run_training(stage)


def test_batches_cover_the_split_once():
    stage = make_stage()
    batches = epoch_batches(stage, 0)
    seen = [i for batch in batches for i in batch]
    assert [len(b) for b in batches] == [4, 4] and len(set(seen)) == 8
    assert epoch_batches(stage, 0) == batches != epoch_batches(stage, 1)
    stage.schedule.drop_last = False
    assert stage.steps_per_epoch == 3 and [len(b) for b in epoch_batches(stage, 0)] == [4, 4, 1]
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
    peers = ScheduleConfig(optimizer="sgd", head_layers="new", head_lr_factor=10, bias_lr_factor=2)
    optimizer = build_optimizer(make_stage().net, 0.01, peers, head_layers(peers))
    rates = [(round(g["peak_lr"] / 0.01), g["weight_decay"]) for g in optimizer.param_groups]
    assert rates == [(1, 5e-4), (2, 0), (10, 5e-4), (20, 0)] and isinstance(optimizer, torch.optim.SGD)


def test_generators_differ_by_purpose_only():
    draw = torch.rand(3, generator=generator(1, "order", 2))
    assert torch.equal(draw, torch.rand(3, generator=generator(1, "order", 2)))
    for other in ((2, "order", 2), (1, "order", 3), (1, "flip", 2)):
        assert not torch.equal(draw, torch.rand(3, generator=generator(*other)))

"""The optimiser loop: one stage of training, resumable after any step.

Whatever is random in a step (which images, how they are changed, what dropout drops) depends on the seed, the stage's
draws and the number of the step alone. So a run that was interrupted needs no generator's state to carry on as if it
never had been: weights, optimiser, SupportNet, prototype memory and the number of the step are all there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pssl.config import EngineConfig, ScheduleConfig
from pssl.engine import checkpoint
from pssl.engine.distributed import average_, is_first, part, rank, share, synchronise, wait, world_size
from pssl.engine.inputs import Inputs
from pssl.engine.optimizer import build_optimizer, lr_share, pass_precision
from pssl.engine.seeding import derive_seed, generator
from pssl.method.losses import Objective
from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet

OnStep = Callable[[dict[str, float]], None]
OnEpoch = Callable[[int], None]


@dataclass
class Stage:
    """One stage: what is trained, on what, for how long.

    `name` goes into files and messages; `draws` names the random order, flips and crops, so that stages that are to
    be compared can share them.
    """

    name: str
    draws: str
    net: CamNet
    support: SupportNet | None
    objective: Objective
    inputs: Inputs
    epochs: int
    lr: float
    schedule: ScheduleConfig
    seed: int
    state_path: Path | None = None
    """Training state is kept here after every epoch; None keeps none."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    seconds: float = field(default=0.0, init=False)
    """Time spent training, resumed time included."""
    history: list[dict[str, float]] = field(default_factory=list, init=False)
    """Losses of every step so far, resumed ones included."""
    best: dict[str, float] = field(default_factory=dict, init=False)
    """What `on_epoch` remembers of the best epoch; kept with the state."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. A split smaller than a batch is one step."""
        count, size = len(self.inputs.ids), self.schedule.batch_size
        return max(count // size if self.schedule.drop_last else -(-count // size), 1)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.steps_per_epoch * self.epochs


def epoch_batches(stage: Stage, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices into the split; depends on seed, draws and epoch alone."""
    count, size = len(stage.inputs.ids), min(stage.schedule.batch_size, len(stage.inputs.ids))
    order = torch.randperm(count, generator=generator(stage.seed, stage.draws, "order", epoch)).tolist()
    batches = [order[i * size : (i + 1) * size] for i in range(stage.steps_per_epoch)]
    parts = stage.engine.accumulate * world_size()
    if len(batches[-1]) < parts:
        raise ValueError(
            f"schedule.batch_size: expected at least one image for each of {world_size()} ranks and "
            f"{stage.engine.accumulate} parts, got a batch of {len(batches[-1])}"
        )
    return batches


def run_stage(
    stage: Stage, *, resume: bool = False, on_step: OnStep | None = None, on_epoch: OnEpoch | None = None
) -> None:
    """Train `stage.net` in place (and its SupportNet and prototype memory along with it).

    With `resume`, steps that `stage.state_path` already holds are not repeated. `on_step` is told of every step's
    losses, `on_epoch` of every epoch's end, before the state is kept.
    """
    device = next(stage.net.parameters()).device
    optimizer = build_optimizer(stage.net, stage.lr, stage.schedule)
    precision = pass_precision(stage.engine, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    _compile(stage)
    first = _restore(stage, optimizer, scaler) if resume else 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        begin = time.perf_counter()
        for step, parts in _loaded(stage, first):
            stage.net.train()
            factor = lr_share(step, stage.steps, stage.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            torch.manual_seed(derive_seed(stage.seed, stage.draws, "net", step, rank()))
            optimizer.zero_grad(set_to_none=True)
            losses = _backward(stage, parts, precision, scaler, device)
            synchronise(stage.net)
            if stage.engine.clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(stage.net.parameters(), stage.engine.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            if stage.support is not None:
                stage.support.update(stage.net)
            values = _values(stage, step, losses)
            epoch = step // stage.steps_per_epoch
            stage.history.append({"epoch": epoch, "step": step, "lr": stage.lr * factor, **values})
            if on_step is not None:
                on_step(stage.history[-1])
            ends = (step + 1) % stage.steps_per_epoch == 0
            if ends and on_epoch is not None:
                on_epoch(epoch)
            if ends or (stage.engine.save_every and (step + 1) % stage.engine.save_every == 0):
                now = time.perf_counter()
                stage.seconds, begin = stage.seconds + now - begin, now
                _keep(stage, optimizer, scaler, step + 1)


Part = tuple[dict[float, Tensor], Tensor, float]
"""Inputs by scale, image labels [b,K], and the part's share of the whole batch's images."""


def _loaded(stage: Stage, first: int) -> Iterator[tuple[int, list[Part]]]:
    """Steps from `first` on with their parts; read one step ahead, in another thread, where inputs are files."""
    device = next(stage.net.parameters()).device

    def load(step: int, batch: list[int]) -> list[Part]:
        own, count = list(share(batch)), stage.engine.accumulate
        draws = share([generator(stage.seed, stage.draws, "change", step, i) for i in range(len(batch))])
        parts = []
        for index in range(count):
            begin, end = part(len(own), count, index)
            inputs = stage.inputs.training(own[begin:end], draws[begin:end], stage.objective.scales)
            labels = stage.inputs.labels[own[begin:end]].to(device)
            parts.append((inputs, labels, _images_of_part(len(batch), count, index) / len(batch)))
        return parts

    def steps() -> Iterator[tuple[int, list[int]]]:
        for epoch in range(first // stage.steps_per_epoch, stage.epochs):
            for number, batch in enumerate(epoch_batches(stage, epoch)):
                step = epoch * stage.steps_per_epoch + number
                if step >= first:
                    yield step, batch

    if not stage.inputs.ahead:
        for step, batch in steps():
            yield step, load(step, batch)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: list = []
        for step, batch in steps():
            waiting.append((step, thread.submit(load, step, batch)))
            if len(waiting) > 1:
                done, future = waiting.pop(0)
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _images_of_part(batch: int, parts: int, index: int) -> int:
    """Images that all ranks together pass in part `index` of a batch."""
    ranks = world_size()
    sizes = [end - begin for begin, end in (part(batch, ranks, r) for r in range(ranks))]
    return sum(end - begin for begin, end in (part(size, parts, index) for size in sizes))


def _backward(
    stage: Stage,
    parts: list[Part],
    precision: torch.dtype,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict[str, Tensor]:
    """Gradients of a batch, part by part; its losses, detached."""
    sums: dict[str, Tensor] = {}
    for inputs, labels, weight in parts:
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            losses = stage.objective(stage.net, stage.support, inputs, labels)
        scaler.scale(losses["total"] * weight).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() * weight
    return sums


def _values(stage: Stage, step: int, losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses of the whole batch as numbers; FloatingPointError unless all are finite."""
    stacked = torch.stack([loss.float() for loss in losses.values()])
    average_([stacked])
    values = dict(zip(losses, stacked.tolist(), strict=True))
    if not bool(stacked.isfinite().all()):
        raise FloatingPointError(f"stage {stage.name}, step {step}: losses must be finite, got {values}")
    return values


def _compile(stage: Stage) -> None:
    """Have torch.compile take over the backbones' passes, if asked."""
    if stage.engine.compile is None:
        return
    if stage.net.frozen:
        raise ValueError(
            "engine.compile: expected a backbone that is trained, got a frozen one, which runs only once"
        )
    nets = [stage.net] + ([stage.support.net] if stage.support is not None else [])
    for net in nets:
        net.backbone.compile(backend=stage.engine.compile)


def _keep(
    stage: Stage, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps_done: int
) -> None:
    """Write the training state; only the first rank does."""
    if stage.state_path is None:
        return
    if is_first():
        state = {
            "steps_done": steps_done,
            "seconds": stage.seconds,
            "history": stage.history,
            "best": stage.best,
            "net": stage.net.trained_state(),
            "objective": stage.objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        if stage.support is not None and stage.support.mode != "shared":
            state["support"] = stage.support.net.trained_state()
        checkpoint.save_state(stage.state_path, state)
    wait()


def _restore(stage: Stage, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Read the training state where there is one; the number of steps that it has done."""
    if stage.state_path is None or not stage.state_path.is_file():
        return 0
    state = checkpoint.load_state(stage.state_path)
    stage.net.load_trained_state(state["net"])
    stage.objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if "support" in state:
        stage.support.net.load_trained_state(state["support"])
    stage.seconds, stage.history, stage.best = state["seconds"], state["history"], state["best"]
    return state["steps_done"]

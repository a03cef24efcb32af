"""The optimiser loop: one stage of training, resumable after any step.

Whatever is random in a step (which images, how they are changed, what dropout drops) depends on the seed, the stage's
draws and the number of the step alone. So a run that was interrupted needs no generator's state to carry on as if it
never had been: weights, optimiser, SupportNet, prototype memory and the number of the step are all there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pssl.core import checkpoint
from pssl.core.ranks import average_, is_first, part, rank, share, synchronise, wait, world_size
from pssl.core.seeding import derive_seed, generator
from pssl.training.base import Draw, Stage, Training
from pssl.training.optimizer import build_optimizer, lr_share, pass_precision

__all__ = ["Draw", "Stage", "Training", "build_optimizer", "epoch_batches", "lr_share", "run_stage"]

OnStep = Callable[[dict[str, float]], None]
OnEpoch = Callable[[int], None]


def epoch_batches(stage: Training, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices into the split; depends on seed, draws and epoch alone."""
    count, size = stage.images, min(stage.schedule.batch_size, stage.images)
    order = torch.randperm(count, generator=generator(stage.seed, stage.draws, "order", epoch)).tolist()
    batches = [order[i * size : (i + 1) * size] for i in range(stage.steps_per_epoch)]
    if len(batches[-1]) < stage.engine.accumulate * world_size():
        raise ValueError(
            f"schedule.batch_size: expected at least one image for each of {world_size()} ranks and "
            f"{stage.engine.accumulate} parts, got a batch of {len(batches[-1])}"
        )
    return batches


def _own_draws(stage: Training, first: int) -> Iterator[Draw]:
    """This rank's share of every step from `first` on, in `engine.accumulate` parts each."""
    for epoch in range(first // stage.steps_per_epoch, stage.epochs):
        for number, batch in enumerate(epoch_batches(stage, epoch)):
            step = epoch * stage.steps_per_epoch + number
            if step < first:
                continue
            own = share(batch)
            draws = share([generator(stage.seed, stage.draws, "change", step, i) for i in range(len(batch))])
            for index in range(stage.engine.accumulate):
                within = slice(*part(len(own), stage.engine.accumulate, index))
                weight = _images_of_part(len(batch), stage.engine.accumulate, index) / len(batch)
                yield Draw(epoch, step, list(own[within]), draws[within], weight)


def _images_of_part(batch: int, parts: int, index: int) -> int:
    """Images that all ranks together pass in part `index` of a batch."""
    ranks = world_size()
    sizes = [end - begin for begin, end in (part(batch, ranks, r) for r in range(ranks))]
    return sum(end - begin for begin, end in (part(size, parts, index) for size in sizes))


def run_stage(
    stage: Training, *, resume: bool = False, on_step: OnStep | None = None, on_epoch: OnEpoch | None = None
) -> None:
    """Train `stage.net` in place (and what goes along with it, SupportNet and prototype memory for one).

    With `resume`, steps that `stage.state_path` already holds are not repeated. `on_step` is told of every step's
    losses, `on_epoch` of every epoch's end, before the state is kept.
    """
    stage.history, stage.best = [], {}
    device = next(stage.net.parameters()).device
    optimizer = build_optimizer(stage.net, stage.lr, stage.schedule, stage.heads)
    precision = pass_precision(stage.engine, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if stage.engine.compile is not None:
        stage.compile(stage.engine.compile)
    first = _restore(stage, optimizer, scaler) if resume else 0
    draws, fed = _own_draws(stage, first), stage.feed(_own_draws(stage, first))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        begin = time.perf_counter()
        for step in range(first, stage.steps):
            if step % stage.steps_per_epoch == 0:
                stage.before_epoch(step // stage.steps_per_epoch)
            stage.net.train()
            factor = lr_share(step, stage.steps, stage.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            torch.manual_seed(derive_seed(stage.seed, stage.draws, "dropout", step, rank()))
            optimizer.zero_grad(set_to_none=True)
            parts = [(next(draws).weight, next(fed)) for _ in range(stage.engine.accumulate)]
            losses = _backward(stage, parts, precision, scaler, device)
            synchronise(stage.net)
            if stage.engine.clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(stage.net.parameters(), stage.engine.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            stage.after_step()
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


def _backward(
    stage: Training,
    parts: list[tuple[float, Any]],  # each with its share of the step's images
    precision: torch.dtype,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict[str, Tensor]:
    """Gradients of a step, part by part; its losses, detached."""
    sums: dict[str, Tensor] = {}
    for weight, fed in parts:
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            losses = stage.losses(fed)
        scaler.scale(losses["total"] * weight).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() * weight
    return sums


def _values(stage: Training, step: int, losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses of the whole batch as numbers; FloatingPointError unless all are finite."""
    stacked = torch.stack([loss.float() for loss in losses.values()])
    average_([stacked])
    values = dict(zip(losses, stacked.tolist(), strict=True))
    if not bool(stacked.isfinite().all()):
        raise FloatingPointError(f"stage {stage.name}, step {step}: losses must be finite, got {values}")
    return values


def _keep(
    stage: Training, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps_done: int
) -> None:
    """Write the training state; only the first rank does."""
    if stage.state_path is None:
        return
    if is_first():
        own = {
            "steps_done": steps_done,
            "seconds": stage.seconds,
            "history": stage.history,
            "best": stage.best,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        checkpoint.save_state(stage.state_path, {**own, **stage.state()})
    wait()


def _restore(stage: Training, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Read the training state where there is one; the number of steps that it has done."""
    if stage.state_path is None or not stage.state_path.is_file():
        return 0
    state = checkpoint.load_state(stage.state_path)
    stage.load_state(state)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    stage.seconds, stage.history, stage.best = state["seconds"], state["history"], state["best"]
    return state["steps_done"]

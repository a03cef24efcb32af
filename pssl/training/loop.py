"""The optimiser loop: runs a training, alone or over ranks, resumable after any step.

Whatever is random in a step (which images, how they are changed, what dropout drops) depends on the seed, the stage's
draws and the number of the step alone. So a run that was interrupted needs no generator's state to carry on as if it
never had been: weights, optimiser, SupportNet, prototype memory and the number of the step are all there is.

Over ranks, DistributedDataParallel averages the gradients while the backward pass goes on. Losses are weighed so that
the average is the gradient of the whole batch: ranks train as one process would.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pssl.core import checkpoint
from pssl.core.errors import InputError
from pssl.core.ranks import average_, is_first, part, rank, share, wait, world_size
from pssl.core.seeding import derive_seed, generator
from pssl.training.base import Draw, Training
from pssl.training.optimizer import build_optimizer, lr_share, pass_precision

OnStep = Callable[[dict[str, float]], None]
OnEpoch = Callable[[int], None]


def epoch_batches(training: Training, epoch: int) -> list[list[int]]:
    """Return the global batches of an epoch, as indices into the split; depends on seed, draws and epoch alone."""
    count, size = training.images, min(training.schedule.batch_size, training.images)
    order = torch.randperm(count, generator=generator(training.seed, training.draws, "order", epoch)).tolist()
    batches = [order[i * size : (i + 1) * size] for i in range(training.steps_per_epoch)]
    if len(batches[-1]) < training.engine.accumulate * world_size():
        raise InputError(
            f"schedule.batch_size: expected at least one image for each of {world_size()} ranks and "
            f"{training.engine.accumulate} parts, got a batch of {len(batches[-1])}"
        )
    return batches


def _own_draws(training: Training, first: int) -> Iterator[Draw]:
    """Yield this rank's share of every step from `first` on, in `engine.accumulate` parts each."""
    for epoch in range(first // training.steps_per_epoch, training.epochs):
        for number, batch in enumerate(epoch_batches(training, epoch)):
            step = epoch * training.steps_per_epoch + number
            if step < first:
                continue
            own = share(batch)
            draws = share(
                [generator(training.seed, training.draws, "change", step, i) for i in range(len(batch))]
            )
            for index in range(training.engine.accumulate):
                within = slice(*part(len(own), training.engine.accumulate, index))
                weight = _images_of_part(len(batch), training.engine.accumulate, index) / len(batch)
                yield Draw(epoch, step, list(own[within]), draws[within], weight)


def _images_of_part(batch: int, parts: int, index: int) -> int:
    """Return how many images all ranks together pass in part `index` of a batch."""
    ranks = world_size()
    sizes = [end - begin for begin, end in (part(batch, ranks, r) for r in range(ranks))]
    return sum(end - begin for begin, end in (part(size, parts, index) for size in sizes))


def run_training(
    training: Training,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train `training.net` in place, and what goes along with it, such as SupportNet and the prototype memory.

    With `resume`, steps that `training.state_path` already holds are not repeated. `on_step` is told of every step's
    losses, `on_epoch` of every epoch's end, before the state is kept.
    """
    training.history, training.best = [], {}
    device = next(training.net.parameters()).device
    optimizer = build_optimizer(training.net, training.lr, training.schedule, training.heads)
    precision = pass_precision(training.engine, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if training.engine.compile is not None:
        training.compile(training.engine.compile)
    first = _restore(training, optimizer, scaler) if resume else 0
    passes = _over_ranks(_Pass(training))
    draws, fed = _own_draws(training, first), training.feed(_own_draws(training, first))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        begin = time.perf_counter()
        for step in range(first, training.steps):
            epoch, last = step // training.steps_per_epoch, (step + 1) % training.steps_per_epoch == 0
            if step % training.steps_per_epoch == 0:
                training.before_epoch(epoch)
            training.net.train()
            factor = lr_share(step, training.steps, training.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            torch.manual_seed(derive_seed(training.seed, training.draws, "dropout", step, rank()))
            optimizer.zero_grad(set_to_none=True)
            parts = [(next(draws).weight, next(fed)) for _ in range(training.engine.accumulate)]
            losses = _backward(passes, parts, precision, scaler, device)
            _average_statistics(training.net)
            if training.engine.clip_norm is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(training.net.parameters(), training.engine.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            training.after_step()
            values = _values(training, step, losses)
            training.history.append({"epoch": epoch, "step": step, "lr": training.lr * factor, **values})
            if on_step is not None:
                on_step(training.history[-1])
            if last and on_epoch is not None:
                on_epoch(epoch)
            if last or (training.engine.save_every and (step + 1) % training.engine.save_every == 0):
                now = time.perf_counter()
                training.seconds, begin = training.seconds + now - begin, now
                _keep(training, optimizer, scaler, step + 1)


class _Pass(nn.Module):
    """The losses of a training as the forward pass of a module that holds the trained network."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.net = training.net
        self.losses = training.losses

    def forward(self, fed: Any) -> dict[str, Tensor]:
        return self.losses(fed)


def _over_ranks(passes: _Pass) -> nn.Module:
    """Return the module with gradients averaged over ranks; as it is in one process.

    `find_unused_parameters` is set although every parameter has a gradient. Without it the first backward pass sorts
    the parameters into other buckets than all later ones; with three ranks or more gloo adds up in an order that
    depends on the place in the bucket, and a run that was resumed would differ in the last bits. Buffers stay apart:
    batch norm's are averaged after each step, SupportNet's belong to no rank.
    """
    if world_size() == 1:
        return passes
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return nn.parallel.DistributedDataParallel(passes, broadcast_buffers=False, find_unused_parameters=True)


@torch.no_grad()
def _average_statistics(net: nn.Module) -> None:
    """Have the mean of the running statistics on every rank."""
    average_(buffer for buffer in net.buffers() if buffer.is_floating_point())


def _backward(
    passes: nn.Module,
    parts: list[tuple[float, Any]],  # each with its share of the step's images
    precision: torch.dtype,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict[str, Tensor]:
    """Compute the gradients of a step, part by part, exchanged with the last; return its losses, detached."""
    sums: dict[str, Tensor] = {}
    for number, (weight, fed) in enumerate(parts, 1):
        alone = number < len(parts) and world_size() > 1
        with passes.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                losses = passes(fed)
            scaler.scale(losses["total"] * weight).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() * weight
    return sums


def _values(training: Training, step: int, losses: dict[str, Tensor]) -> dict[str, float]:
    """Return the losses of the whole batch as numbers; raises FloatingPointError unless all are finite."""
    stacked = torch.stack([loss.float() for loss in losses.values()])
    average_([stacked])
    values = dict(zip(losses, stacked.tolist(), strict=True))
    if not bool(stacked.isfinite().all()):
        raise FloatingPointError(
            f"training {training.name}, step {step}: losses must be finite, got {values}"
        )
    return values


def _keep(
    training: Training, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps_done: int
) -> None:
    """Write the training state; only the first rank does."""
    if training.state_path is None:
        return
    if is_first():
        own = {
            "steps_done": steps_done,
            "seconds": training.seconds,
            "history": training.history,
            "best": training.best,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        checkpoint.save_state(training.state_path, {**own, **training.state()})
    wait()


def _restore(training: Training, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Read the training state where there is one; return how many steps it has done."""
    if training.state_path is None or not training.state_path.is_file():
        return 0
    state = checkpoint.load_state(training.state_path)
    training.load_state(state)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    training.seconds, training.history, training.best = state["seconds"], state["history"], state["best"]
    return state["steps_done"]

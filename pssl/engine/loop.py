"""The optimiser loop: one stage of training, resumable after any epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pssl.config import ScheduleConfig
from pssl.engine import checkpoint
from pssl.engine.distributed import is_first, share, synchronise, wait, world_size
from pssl.engine.inputs import Inputs
from pssl.engine.seeding import generator
from pssl.method.losses import Objective
from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet

OnStep = Callable[[dict[str, float]], None]


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
    seconds: float = field(default=0.0, init=False)
    """Time spent training, resumed time included."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the split; a split smaller than a batch is one step."""
        return max(len(self.inputs.ids) // self.schedule.batch_size, 1)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.steps_per_epoch * self.epochs


HEAD = ("classifier.", "pixel_correlation.")
"""Prefixes of the parameters that train at the rate of the head."""


def build_optimizer(net: CamNet, lr: float, schedule: ScheduleConfig) -> torch.optim.AdamW:
    """AdamW with a higher rate for the CAM layer (and SEAM's module) and weight decay on matrices and kernels only.

    Each group keeps its peak rate in "peak_lr"; the schedule scales that.
    """
    groups = []
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for is_head in (False, True):
        for decays in (False, True):
            parameters = [p for n, p in trained if n.startswith(HEAD) == is_head and (p.ndim > 1) == decays]
            if parameters:
                peak = lr * (schedule.head_lr_factor if is_head else 1.0)
                decay = schedule.weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def lr_share(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate at `step`, as a share of its peak: linear warmup, times (1 - step/steps)^power."""
    warm = schedule.warmup * steps
    rise = min((step + 1) / warm, 1.0) if warm > 0 else 1.0
    return rise * (1 - step / steps) ** schedule.poly_power


def epoch_batches(stage: Stage, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices into the split; depends on seed, draws and epoch alone."""
    count, size = len(stage.inputs.ids), min(stage.schedule.batch_size, len(stage.inputs.ids))
    if size % world_size():
        raise ValueError(f"schedule.batch_size: expected a multiple of {world_size()} ranks, got {size}")
    order = torch.randperm(count, generator=generator(stage.seed, stage.draws, "order", epoch)).tolist()
    return [order[i * size : (i + 1) * size] for i in range(stage.steps_per_epoch)]


def run_stage(stage: Stage, *, resume: bool = False, on_step: OnStep | None = None) -> None:
    """Train `stage.net` in place (and its SupportNet and prototype memory along with it).

    With `resume`, epochs that `stage.state_path` already holds are not repeated.
    """
    optimizer = build_optimizer(stage.net, stage.lr, stage.schedule)
    first = _restore(stage, optimizer) if resume else 0
    device = next(stage.net.parameters()).device
    for epoch in range(first, stage.epochs):
        begin = time.perf_counter()
        stage.net.train()
        for number, batch in enumerate(epoch_batches(stage, epoch)):
            step = epoch * stage.steps_per_epoch + number
            factor = lr_share(step, stage.steps, stage.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            own = list(share(batch))
            draws = [generator(stage.seed, stage.draws, "change", step, i) for i in range(len(batch))]
            inputs = stage.inputs.training(own, share(draws), stage.objective.scales)
            labels = stage.inputs.labels[own].to(device)
            optimizer.zero_grad(set_to_none=True)
            losses = stage.objective(stage.net, stage.support, inputs, labels)
            losses["total"].backward()
            synchronise(stage.net)
            optimizer.step()
            if stage.support is not None:
                stage.support.update(stage.net)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not all(torch.isfinite(torch.tensor(list(values.values())))):
                raise FloatingPointError(
                    f"stage {stage.name}, step {step}: losses must be finite, got {values}"
                )
            if on_step is not None:
                on_step({"epoch": epoch, "step": step, "lr": stage.lr * factor, **values})
        stage.seconds += time.perf_counter() - begin
        _keep(stage, optimizer, epoch + 1)


def _keep(stage: Stage, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    """Write the training state; only the first rank does."""
    if stage.state_path is None:
        return
    if is_first():
        state = {
            "epochs_done": epochs_done,
            "seconds": stage.seconds,
            "net": stage.net.trained_state(),
            "objective": stage.objective.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        if stage.support is not None and stage.support.mode != "shared":
            state["support"] = stage.support.net.trained_state()
        checkpoint.save_state(stage.state_path, state)
    wait()


def _restore(stage: Stage, optimizer: torch.optim.Optimizer) -> int:
    """Read the training state where there is one; the number of epochs that it has done."""
    if stage.state_path is None or not stage.state_path.is_file():
        return 0
    state = checkpoint.load_state(stage.state_path)
    stage.net.load_trained_state(state["net"])
    stage.objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    if "support" in state:
        stage.support.net.load_trained_state(state["support"])
    stage.seconds = state["seconds"]
    return state["epochs_done"]

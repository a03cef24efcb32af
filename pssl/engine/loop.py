"""The optimiser loop: one stage of training, resumable after any epoch."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pssl.config import OptimizerConfig, ScheduleConfig
from pssl.engine import checkpoint
from pssl.engine.distributed import is_first, rank, share, synchronise, wait, world_size
from pssl.engine.inputs import Inputs
from pssl.engine.seeding import derive_seed, generator
from pssl.method.losses import Objective
from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet

OnStep = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Draw:
    """This rank's share of one step: indices into the split, and a generator for each."""

    epoch: int
    step: int
    indices: list[int]
    generators: Sequence[torch.Generator]


class Training(ABC):
    """What :func:`run_stage` needs to know of a training: what is trained, on what, for how long.

    `name` goes into files and messages; `draws` names the random order, flips and crops, so that trainings that are to
    be compared can share them.
    """

    name: str
    draws: str
    net: nn.Module
    epochs: int
    lr: float
    schedule: OptimizerConfig
    seed: int
    state_path: Path | None
    """Training state is kept here after every epoch; None keeps none."""
    seconds: float
    """Time spent training, resumed time included."""
    heads: tuple[str, ...] = ("classifier.", "pixel_correlation.")
    """Names of the parameters that learn at the head's rate start with one of these."""

    @property
    @abstractmethod
    def images(self) -> int:
        """Images of the split."""

    @abstractmethod
    def feed(self, draws: Iterator[Draw]) -> Iterator[Any]:
        """What :meth:`losses` takes, for each of the steps, in order; may read ahead."""

    @abstractmethod
    def losses(self, fed: Any) -> dict[str, Tensor]:
        """The losses of a step by name; "total" is the one to minimise."""

    def before_epoch(self, epoch: int) -> None:  # noqa: B027
        """Called before the first step of each epoch."""

    def after_step(self) -> None:  # noqa: B027 (most trainings have nothing to do)
        """Called after each step of the optimiser."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the training state holds beside the optimiser's."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the split; a split smaller than a batch is one step."""
        return max(self.images // self.schedule.batch_size, 1)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.steps_per_epoch * self.epochs


@dataclass
class Stage(Training):
    """Training of a CAM network: stage 1, or an arm with SupportNet."""

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
    refresh: Callable[[Stage], None] | None = None
    """Called before the first step of every `refresh_epochs`-th epoch but the first."""
    refresh_epochs: int = 0
    seconds: float = field(default=0.0, init=False)

    @property
    def images(self) -> int:
        return len(self.inputs.ids)

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[dict[float, Tensor], Tensor]]:
        device = next(self.net.parameters()).device
        for draw in draws:
            inputs = self.inputs.training(draw.indices, draw.generators, self.objective.scales)
            yield inputs, self.inputs.labels[draw.indices].to(device)

    def losses(self, fed: tuple[dict[float, Tensor], Tensor]) -> dict[str, Tensor]:
        return self.objective(self.net, self.support, *fed)

    def before_epoch(self, epoch: int) -> None:
        if self.refresh is not None and epoch and epoch % self.refresh_epochs == 0:
            self.refresh(self)

    def after_step(self) -> None:
        if self.support is not None:
            self.support.update(self.net)

    def state(self) -> dict[str, Any]:
        state = {"net": self.net.trained_state(), "objective": self.objective.state_dict()}
        if self.support is not None and self.support.mode != "shared":
            state["support"] = self.support.net.trained_state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_trained_state(state["net"])
        self.objective.load_state_dict(state["objective"])
        if "support" in state:
            self.support.net.load_trained_state(state["support"])


def build_optimizer(
    net: nn.Module, lr: float, schedule: OptimizerConfig, heads: tuple[str, ...] = Training.heads
) -> torch.optim.AdamW:
    """AdamW with a higher rate for the head and weight decay on matrices and kernels only.

    Each group keeps its peak rate in "peak_lr"; the schedule scales that.
    """
    groups = []
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for is_head in (False, True):
        for decays in (False, True):
            parameters = [
                p for name, p in trained if name.startswith(heads) == is_head and (p.ndim > 1) == decays
            ]
            if parameters:
                peak = lr * (schedule.head_lr_factor if is_head else 1.0)
                decay = schedule.weight_decay if decays else 0.0
                groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def lr_share(step: int, steps: int, schedule: OptimizerConfig) -> float:
    """The learning rate at `step`, as a share of its peak: linear warmup, times (1 - step/steps)^power."""
    warm = schedule.warmup * steps
    rise = min((step + 1) / warm, 1.0) if warm > 0 else 1.0
    return rise * (1 - step / steps) ** schedule.poly_power


def epoch_batches(stage: Training, epoch: int) -> list[list[int]]:
    """The global batches of an epoch, as indices into the split; depends on seed, draws and epoch alone."""
    count, size = stage.images, min(stage.schedule.batch_size, stage.images)
    if size % world_size():
        raise ValueError(f"schedule.batch_size: expected a multiple of {world_size()} ranks, got {size}")
    order = torch.randperm(count, generator=generator(stage.seed, stage.draws, "order", epoch)).tolist()
    return [order[i * size : (i + 1) * size] for i in range(stage.steps_per_epoch)]


def _own_draws(stage: Training, epoch: int) -> Iterator[Draw]:
    """This rank's share of each step of an epoch."""
    for number, batch in enumerate(epoch_batches(stage, epoch)):
        step = epoch * stage.steps_per_epoch + number
        draws = [generator(stage.seed, stage.draws, "change", step, i) for i in range(len(batch))]
        yield Draw(epoch, step, list(share(batch)), share(draws))


def run_stage(stage: Training, *, resume: bool = False, on_step: OnStep | None = None) -> None:
    """Train `stage.net` in place (and what goes along with it, SupportNet and prototype memory for one).

    With `resume`, epochs that `stage.state_path` already holds are not repeated.
    """
    optimizer = build_optimizer(stage.net, stage.lr, stage.schedule, stage.heads)
    first = _restore(stage, optimizer) if resume else 0
    for epoch in range(first, stage.epochs):
        begin = time.perf_counter()
        stage.before_epoch(epoch)
        stage.net.train()
        for number, fed in enumerate(stage.feed(_own_draws(stage, epoch))):
            step = epoch * stage.steps_per_epoch + number
            factor = lr_share(step, stage.steps, stage.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(stage.seed, stage.draws, "dropout", step, rank()))
                losses = stage.losses(fed)
            losses["total"].backward()
            synchronise(stage.net)
            optimizer.step()
            stage.after_step()
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not all(torch.isfinite(torch.tensor(list(values.values())))):
                raise FloatingPointError(
                    f"stage {stage.name}, step {step}: losses must be finite, got {values}"
                )
            if on_step is not None:
                on_step({"epoch": epoch, "step": step, "lr": stage.lr * factor, **values})
        stage.seconds += time.perf_counter() - begin
        _keep(stage, optimizer, epoch + 1)


def _keep(stage: Training, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    """Write the training state; only the first rank does."""
    if stage.state_path is None:
        return
    if is_first():
        own = {"epochs_done": epochs_done, "seconds": stage.seconds, "optimizer": optimizer.state_dict()}
        checkpoint.save_state(stage.state_path, {**own, **stage.state()})
    wait()


def _restore(stage: Training, optimizer: torch.optim.Optimizer) -> int:
    """Read the training state where there is one; the number of epochs that it has done."""
    if stage.state_path is None or not stage.state_path.is_file():
        return 0
    state = checkpoint.load_state(stage.state_path)
    stage.load_state(state)
    optimizer.load_state_dict(state["optimizer"])
    stage.seconds = state["seconds"]
    return state["epochs_done"]

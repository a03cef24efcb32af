"""What the optimiser loop is told of a training, and the training of a CAM network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pssl.config.optimizer import EngineConfig, OptimizerConfig, ScheduleConfig
from pssl.inputs.images import Inputs, Views
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet
from pssl.training.optimizer import CAM_LAYERS, head_layers


@dataclass(frozen=True)
class Draw:
    """This rank's share of one step, or of a part of one: indices into the split, and a generator for each."""

    epoch: int
    step: int
    indices: list[int]
    generators: Sequence[torch.Generator]
    weight: float = 1.0
    """The part's share of the images of the whole step."""


class Training(ABC):
    """What `run_stage` needs to know of a training: what is trained, on what, for how long.

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
    engine: EngineConfig = EngineConfig(precision="fp32")
    """How steps are computed."""
    seconds: float
    """Time spent training, resumed time included."""
    history: list[dict[str, float]]
    """Losses of every step so far, resumed ones included; set by `run_stage`."""
    best: dict[str, float]
    """What `on_epoch` remembers of the best epoch; set to {} by `run_stage`, and kept with the state."""
    heads: tuple[str, ...] = CAM_LAYERS
    """Names of the parameters that learn at the head's rate start with one of these."""

    @property
    @abstractmethod
    def images(self) -> int:
        """Images of the split."""

    @abstractmethod
    def feed(self, draws: Iterator[Draw]) -> Iterator[Any]:
        """What :meth:`losses` takes, for each of the draws, in order; may read ahead."""

    @abstractmethod
    def losses(self, fed: Any) -> dict[str, Tensor]:
        """The losses of a step by name; "total" is the one to minimise."""

    def before_epoch(self, epoch: int) -> None:  # noqa: B027 (most trainings have nothing to do)
        """Called before the first step of each epoch."""

    def after_step(self) -> None:  # noqa: B027
        """Called after each step of the optimiser."""

    def compile(self, backend: str) -> None:
        """Have torch.compile take over what is worth it; the whole network by default."""
        self.net.compile(backend=backend)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the training state holds beside the optimiser's."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. A split smaller than a batch is one step."""
        size = self.schedule.batch_size
        return max(self.images // size if self.schedule.drop_last else -(-self.images // size), 1)

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
    engine: EngineConfig = field(default_factory=EngineConfig)
    refresh: Callable[[Stage], None] | None = None
    """Called before the first step of every `refresh_epochs`-th epoch but the first."""
    refresh_epochs: int = 0
    seconds: float = field(default=0.0, init=False)

    @property
    def heads(self) -> tuple[str, ...]:
        return head_layers(self.schedule)

    @property
    def images(self) -> int:
        return len(self.inputs.ids)

    def feed(self, draws: Iterator[Draw]) -> Iterator[tuple[Views, Tensor, int]]:
        device = next(self.net.parameters()).device

        def load(draw: Draw) -> tuple[Views, Tensor, int]:
            views = self.inputs.training(draw.indices, draw.generators, self.objective.scales)
            return views, self.inputs.labels[draw.indices].to(device), draw.epoch

        if not self.inputs.ahead:
            yield from map(load, draws)
            return
        with ThreadPoolExecutor(1) as thread:
            waiting: deque = deque()
            for draw in draws:
                waiting.append(thread.submit(load, draw))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def losses(self, fed: tuple[Views, Tensor, int]) -> dict[str, Tensor]:
        views, image_labels, epoch = fed
        return self.objective(self.net, self.support, views.inputs, image_labels, epoch, views.pixels)

    def before_epoch(self, epoch: int) -> None:
        if self.refresh is not None and epoch and epoch % self.refresh_epochs == 0:
            self.refresh(self)

    def after_step(self) -> None:
        if self.support is not None:
            self.support.update(self.net)

    def compile(self, backend: str) -> None:
        """The backbones' passes."""
        if self.net.frozen:
            raise ValueError(
                "engine.compile: expected a backbone that is trained, got a frozen one, which runs only once"
            )
        self.net.backbone.compile(backend=backend)
        if self.support is not None and self.support.net is not self.net:
            self.support.net.backbone.compile(backend=backend)

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

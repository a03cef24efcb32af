"""The training of a CAM network: stage 1, or an arm with SupportNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pssl.config.optimizer import EngineConfig, ScheduleConfig
from pssl.core.errors import InputError
from pssl.core.threads import read_ahead
from pssl.inputs.images import Inputs, Views
from pssl.method.objective import Objective
from pssl.method.support import SupportNet
from pssl.method.terms import Nets
from pssl.models.cam_net import CamNet
from pssl.models.prototypes import Prototypes
from pssl.training.base import Draw, Training
from pssl.training.optimizer import head_layers


@dataclass
class CamTraining(Training):
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
    prototypes: Callable[[], Prototypes] | None = None
    """Finds MainNet's prototypes over the training split, for terms that ask for them between epochs."""
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
            yield from read_ahead(thread, load, draws, 1)

    def losses(self, fed: tuple[Views, Tensor, int]) -> dict[str, Tensor]:
        views, image_labels, epoch = fed
        return self.objective(self.net, self.support, views.inputs, image_labels, epoch, views.pixels)

    def before_epoch(self, epoch: int) -> None:
        self.objective.before_epoch(epoch, Nets(self.net, self.support, self.prototypes))

    def after_step(self) -> None:
        if self.support is not None:
            self.support.update(self.net)

    def compile(self, backend: str) -> None:
        """The backbones' passes."""
        if self.net.frozen:
            raise InputError(
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

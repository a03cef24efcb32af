"""What the optimiser loop is told of a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pssl.config.optimizer import EngineConfig, OptimizerConfig
from pssl.training.optimizer import CAM_LAYERS


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
    """A training as `run_training` sees it: what is trained, on what, for how long.

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
    """Losses of every step so far, resumed ones included; set by `run_training`."""
    best: dict[str, float]
    """What `on_epoch` remembers of the best epoch; set to {} by `run_training`, and kept with the state."""
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

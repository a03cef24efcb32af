"""The typed configuration of a training run.

Every value a run depends on is a field, with a docstring that says what it is and where its default comes
from. Flags (``--data.root``) and YAML keys (``data: {root: ...}``) are made from these fields by :mod:`pssl.cli`;
``OUT/config.yaml`` is the whole configuration as it ran, and running it again repeats the run.

Defaults suit the embedded synthetic data and a small network on a CPU. Another backbone brings its own recipe, a
YAML file of ``pssl/recipes`` that its file in ``pssl/models/backbones`` names. A recipe is applied before ``--config``
and before flags.

"The paper" is Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*,
arXiv 2112.05351. "Measured" means chosen on the training part of the data in question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pssl.config.data import DataConfig
from pssl.config.model import ModelConfig
from pssl.config.optimizer import EngineConfig, ScheduleConfig
from pssl.config.reading import EvaluationConfig, InferenceConfig
from pssl.config.values import Integers, Names, require
from pssl.core.errors import InputError
from pssl.method.arms import ARMS, DEFAULT_ARMS
from pssl.method.terms import TERMS, MethodConfig
from pssl.models.backbones import find_backbone


@dataclass
class TrainConfig:
    """`python -m pssl.train`: train a classifier, then RCM and MAM from the same weights, and compare."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    recipe: str = "auto"
    """Defaults to start from: synthetic, photographs, voc12_resnet38d, voc12_resnet50, coco14_resnet50, voc12_vit
    (files of pssl/recipes), or "auto": the backbone's own, none where it names none."""
    out: Path = Path("runs/train")
    """Folder for everything the run leaves behind."""
    arms: Names = DEFAULT_ARMS
    """Arms to train and compare: classifier, classifier_long, rcm, mam, rcm+mam (or pssl, the same), seam, ppc."""
    seed: int = 0
    """Seed of weights, order, flips and crops. Same seed, same machine, same numbers."""
    seeds: Integers = ()
    """Repeat the whole run for these seeds and report mean and spread. Empty: `seed` alone."""
    threads: int | None = None
    """CPU threads. None: PyTorch's choice."""
    device: str = "auto"
    """Torch device, or "auto": CUDA where there is one, else CPU."""
    resume: bool = False
    """Carry on from what OUT/checkpoints holds, with the numbers of a run that was never interrupted. What training
    depends on must be as in OUT/config.yaml; arms and seeds may be added."""
    pictures: int = 8
    """Held-out images drawn into OUT/pictures."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise InputError(f"arms: expected names from {', '.join(ARMS)}, got {', '.join(unknown)}")
        require("arms", "none", len(self.arms) > 0, "at least one")
        if len(set(self.arms)) != len(self.arms) or {"pssl", "rcm+mam"} <= set(self.arms):
            raise InputError(f"arms: expected each once (pssl is rcm+mam), got {', '.join(self.arms)}")

    def check(self) -> None:
        """Raise InputError for settings that do not fit each other, before anything is trained by them."""
        terms = dict.fromkeys(term for arm in self.arms for term in ARMS[arm])
        for name in terms:
            term = getattr(self.method, name)
            TERMS[name].check(term, self.method)
            from_epoch = getattr(term, "from_epoch", 0)
            expected = f"less than the arms' {self.schedule.arm_epochs} epochs"
            require(f"method.{name}.from_epoch", from_epoch, from_epoch < self.schedule.arm_epochs, expected)

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        backbone = find_backbone(self.model.backbone)
        name = backbone.train_recipe if self.recipe == "auto" else self.recipe
        return {} if name is None else {"": name}

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds to run, one or more."""
        return self.seeds or (self.seed,)

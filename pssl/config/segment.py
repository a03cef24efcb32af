"""Settings of the segmentation network: what is trained on pseudo labels, and how it labels images."""

from __future__ import annotations

from dataclasses import dataclass, field

from pssl.config.model import SegmenterConfig
from pssl.config.optimizer import SegmentScheduleConfig
from pssl.config.reading import PredictConfig
from pssl.config.refine import CRFConfig
from pssl.config.values import Floats


@dataclass
class SegmentSettings:
    """What is trained on the pseudo labels, and how it labels images."""

    recipe: str = "auto"
    """Defaults to start from: synthetic, photographs, voc12_resnet38d, voc12_resnet101 (files of pssl/recipes/segment),
    or "auto": the backbone's own, none where it names none; in pssl.pipeline that of the CAM network's backbone."""
    size: int | None = None
    """Side in pixels of the square that training shows. None: `data.size`."""
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    schedule: SegmentScheduleConfig = field(default_factory=SegmentScheduleConfig)
    zoom: Floats = (0.75, 1.5)
    """Training images are resized so that their long side is `size` times a random factor of this range, then cut or
    padded to `size` (DeepLab: 0.5 to 1.5 or 2 times the image's own size)."""
    frozen_scales: Floats = (0.5, 1.0, 1.5, 2.0)
    """Scales of which a step shows one, with a frozen backbone, in place of `zoom`. The default ones are in the cache
    where the CAM network had the same backbone, frozen, and `size`."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    crf: CRFConfig = field(default_factory=CRFConfig)

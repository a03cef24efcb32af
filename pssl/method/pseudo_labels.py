"""From CAMs to labels of pixels: a background score, refinement by the image, the best region.

What is handed from step to step are *scores*, float32 [1+k,H,W]: the background's first, then those of the image's
classes in ascending order of their region numbers. The best score wins; of equals the first, so that a CAM equal to the
threshold is background, as in `cam_sweep`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.config.refine import CRFConfig, PARConfig
from pssl.data.voc import IGNORE
from pssl_ext import dense_crf, pixel_refine, random_walk


def label_scores(
    cams: Tensor,  # [k,H,W] in 0..1
    class_ids: Tensor,  # [k]
    threshold: float,
    power: float | None = None,
) -> tuple[Tensor, list[int]]:
    """Scores [1+k,H,W], and the region numbers of their rows: 0, then `class_ids` in ascending order.

    The background's score is `threshold`, or (1 - max CAM)^power where `power` is given (AffinityNet's).
    """
    ids, order = class_ids.long().sort()
    cams = cams.float()[order]
    if power is None or not len(cams):
        background = torch.full((1, *cams.shape[1:]), threshold)
    else:
        background = (1 - cams.amax(0, keepdim=True)).clamp(0, 1) ** power
    return torch.cat([background, cams]), [0, *ids.tolist()]


def shares(scores: Tensor) -> Tensor:  # [1+k,H,W]
    """The scores divided by their sum over regions: probabilities."""
    return scores / scores.sum(0, keepdim=True).clamp(min=1e-12)


def probabilities(scores: Tensor, sharpness: float) -> Tensor:  # [1+k,H,W]
    """Softmax of the scores times `sharpness`: how sure a pixel is depends on how far its scores are apart, and not, as
    with `shares`, on how high the threshold is."""
    return (sharpness * scores).softmax(0)


def crf_step(image: Tensor, p: Tensor, config: CRFConfig) -> Tensor:  # uint8 [3,H,W], probabilities [1+k,H,W]
    """Probabilities [1+k,H,W] after mean field on the image's colours (`dense_crf`)."""
    return dense_crf(
        image[None],
        p[None],
        iterations=config.iterations,
        gaussian=config.gaussian,
        bilateral=config.bilateral,
    )[0]


def par_step(image: Tensor, p: Tensor, config: PARConfig) -> Tensor:  # uint8 [3,H,W], probabilities [1+k,H,W]
    """Probabilities [1+k,H,W] after pixel-adaptive refinement (`pixel_refine`)."""
    refined = pixel_refine(
        image[None].float(),
        p[None],
        dilations=config.dilations,
        iterations=config.iterations,
        colour_scale=config.colour_scale,
        position_weight=config.position_weight,
    )
    return shares(refined[0])


def walk_step(
    features: Tensor,  # [D,h,w]: AffinityNet's
    scores: Tensor,  # [1+k,H,W]
    radius: int,
    beta: float,
    log2_steps: int,
) -> Tensor:
    """Scores [1+k,H,W] after a random walk on the grid of `features`, background and all (AffinityNet).

    They go to the grid as means over its cells, come back bilinearly, and are brought back to the maximum that each had
    (IRN), since a walk flattens what it spreads: a threshold means the same before and after.
    """
    small = F.adaptive_avg_pool2d(scores[None], features.shape[1:])[0]
    walked = random_walk(small, features=features, radius=radius, beta=beta, log2_steps=log2_steps)
    walked = F.interpolate(walked[None], size=scores.shape[1:], mode="bilinear", align_corners=False)[0]
    highest = walked.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return walked * (scores.amax((1, 2), keepdim=True) / highest)


def best_regions(scores: Tensor, regions: list[int], unsure: float | None = None) -> Tensor:
    """Labels uint8 [H,W]: each pixel's best region, or 255 where its share of the scores is below `unsure`."""
    labels = torch.tensor(regions, dtype=torch.uint8)[scores.argmax(0)]
    if unsure is not None:
        labels[shares(scores).amax(0) < unsure] = IGNORE
    return labels


def confident_regions(sure_of_classes: Tensor, sure_of_background: Tensor) -> Tensor:  # uint8 [H,W] each
    """What two labellings let one be sure of (IRN): the classes of the one that is sparing with them, background where
    neither the one nor the other, which is generous with classes, has a class; 255 between."""
    between = (sure_of_classes == 0) & (sure_of_background != 0)
    return torch.where(between, IGNORE, sure_of_classes).to(torch.uint8)

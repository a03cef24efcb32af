"""Classification: the loss of the image-level labels, which every arm has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pssl.method.terms.base import Step, Term
from pssl.method.terms.registry import register
from pssl.models.cam_net import CamNet


@dataclass
class ClassificationConfig:
    """The loss of the image-level labels."""

    weight: float = 1.0
    """Weight of the loss in the arms (paper: 1). It is the multi-label soft-margin loss, which is the binary
    cross-entropy of the logits, averaged over classes."""


def classification_loss(logits: Tensor, image_labels: Tensor) -> Tensor:  # [B,K], [B,K]
    """Return the multi-label soft-margin loss, a scalar of at least float32 (paper; PSA, SEAM and IRN alike)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.multilabel_soft_margin_loss(logits, image_labels.to(logits.dtype))


@register
class Classification(Term):
    """The classification loss of every view of the image, averaged: one, or both of SEAM's."""

    name = "classification"
    Config = ClassificationConfig

    def forward(self, step: Step) -> Tensor:
        """Return the loss, a scalar."""
        logits = [CamNet.logits(step.main[view].cam) for view in step.views]
        each = [classification_loss(view, step.image_labels) for view in logits]
        return sum(each) / len(each)

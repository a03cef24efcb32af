"""The optimiser of a stage, its learning rates, and the precision its passes are computed in."""

from __future__ import annotations

import torch

from pssl.config import EngineConfig, ScheduleConfig
from pssl.models.cam_net import CamNet

CAM_LAYERS = ("classifier.", "pixel_correlation.")
"""Prefixes of the parameters that `head_layers: cam` means."""


def build_optimizer(net: CamNet, lr: float, schedule: ScheduleConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained: backbone and head, weights and biases each with a rate of their own.

    Biases (and what else has one dimension) have no weight decay. Each group keeps its peak rate in "peak_lr"; the
    schedule scales that.
    """
    groups = []
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for is_head in (False, True):
        for is_bias in (False, True):
            parameters = [
                p for name, p in trained if _is_head(name, schedule) == is_head and (p.ndim <= 1) == is_bias
            ]
            if parameters:
                peak = lr * (schedule.head_lr_factor if is_head else 1.0)
                peak *= schedule.bias_lr_factor if is_bias else 1.0
                decay = 0.0 if is_bias else schedule.weight_decay
                groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum)
    return torch.optim.AdamW(groups)


def _is_head(name: str, schedule: ScheduleConfig) -> bool:
    if schedule.head_layers == "new":
        return not name.startswith("backbone.")
    return name.startswith(CAM_LAYERS)


def lr_share(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate at `step`, as a share of its peak: linear warmup, times (1 - step/steps)^power."""
    warm = schedule.warmup * steps
    rise = min((step + 1) / warm, 1.0) if warm > 0 else 1.0
    return rise * (1 - step / steps) ** schedule.poly_power


def pass_precision(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """The type that the networks' passes are computed in; ValueError for fp16 without CUDA."""
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if engine.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"engine.precision: fp16 needs CUDA, got device {device}; bf16 and fp32 run there too"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[engine.precision]

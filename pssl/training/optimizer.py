"""The optimiser of a stage, its learning rates, and the precision its passes are computed in."""

from __future__ import annotations

import torch
from torch import nn

from pssl.config.optimizer import EngineConfig, OptimizerConfig, ScheduleConfig
from pssl.core.errors import InputError

CAM_LAYERS = ("classifier.", "pixel_correlation.")
"""Prefixes of the parameters that `head_layers: cam` means."""
NEW_LAYERS = ("embed.", *CAM_LAYERS)
"""Prefixes of all parameters of a CAM network that are not its backbone's."""


def head_layers(schedule: ScheduleConfig) -> tuple[str, ...]:
    """Prefixes of the parameters that learn at the head's rate."""
    return NEW_LAYERS if schedule.head_layers == "new" else CAM_LAYERS


def build_optimizer(
    net: nn.Module, lr: float, schedule: OptimizerConfig, heads: tuple[str, ...] = CAM_LAYERS
) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained: backbone and head, weights and biases each with a rate of their own.

    Parameters whose names start with one of `heads` learn at the head's rate. Biases (and what else has one dimension)
    have no weight decay. Each group keeps its peak rate in "peak_lr"; the schedule scales that.
    """
    groups = []
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for is_head in (False, True):
        for is_bias in (False, True):
            parameters = [
                p for name, p in trained if name.startswith(heads) == is_head and (p.ndim <= 1) == is_bias
            ]
            if parameters:
                peak = lr * (schedule.head_lr_factor if is_head else 1.0)
                peak *= schedule.bias_lr_factor if is_bias else 1.0
                decay = 0.0 if is_bias else schedule.weight_decay
                groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay})
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum)
    return torch.optim.AdamW(groups)


def lr_share(step: int, steps: int, schedule: OptimizerConfig) -> float:
    """The learning rate at `step`, as a share of its peak: linear warmup, times (1 - step/steps)^power."""
    warm = schedule.warmup * steps
    rise = min((step + 1) / warm, 1.0) if warm > 0 else 1.0
    return rise * (1 - step / steps) ** schedule.poly_power


def pass_precision(engine: EngineConfig, device: torch.device) -> torch.dtype:
    """The type that the networks' passes are computed in; ValueError for fp16 without CUDA."""
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if engine.precision == "fp16" and device.type != "cuda":
        raise InputError(
            f"engine.precision: fp16 needs CUDA, got device {device}; bf16 and fp32 run there too"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[engine.precision]

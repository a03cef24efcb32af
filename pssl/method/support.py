"""SupportNet: the network whose CAMs and features are the targets of the self-supervised terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from pssl.models.cam_net import CamNet, CamOutput


class SupportNet(nn.Module):
    """MainNet's companion, always in eval mode and never with a gradient (paper, section 3).

    Args:
        main: MainNet, as it is when the arm starts.
        mode: "ema" (moving average of MainNet), "frozen" (MainNet as it is now), "shared" (MainNet's own weights).
        momentum: m of the moving average support <- m * support + (1 - m) * main, for parameters and for the
            running statistics of batch norm alike; default 0.996 (as BYOL, Grill et al. 2020).
    """

    def __init__(
        self, main: CamNet, mode: Literal["ema", "frozen", "shared"] = "ema", momentum: float = 0.996
    ) -> None:
        super().__init__()
        if mode not in ("ema", "frozen", "shared"):
            raise ValueError(f"SupportNet: mode expected 'ema', 'frozen' or 'shared', got {mode!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"SupportNet: momentum expected in 0..1, got {momentum}")
        self.mode = mode
        self.momentum = momentum
        self.net = main if mode == "shared" else main.twin().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SupportNet:
        """Stays in eval mode (and leaves a shared MainNet alone)."""
        return self

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> CamOutput:  # as CamNet.forward
        """Features and CAM in eval mode, without gradient."""
        return self._in_eval_mode(self.net, inputs)

    @torch.no_grad()
    def head(self, activations: torch.Tensor) -> CamOutput:  # as CamNet.head
        """The same from activations that MainNet and this network have in common."""
        return self._in_eval_mode(self.net.head, activations)

    def _in_eval_mode(self, call: Callable[[torch.Tensor], CamOutput], inputs: torch.Tensor) -> CamOutput:
        training = self.net.training
        self.net.eval()
        output = call(inputs)
        self.net.train(training)
        return output

    @torch.no_grad()
    def restart(self, main: CamNet) -> None:
        """Become MainNet as it is now."""
        if self.mode != "shared":
            self.net.load_trained_state(main.trained_state())

    @torch.no_grad()
    def update(self, main: CamNet) -> None:
        """One step of the moving average; nothing for the other modes. Integer buffers are copied."""
        if self.mode != "ema":
            return
        own, other = self.net.trained_state(), main.trained_state()
        floating = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [own[name] for name in floating], [other[name] for name in floating], 1 - self.momentum
        )
        for name in own.keys() - set(floating):
            own[name].copy_(other[name])

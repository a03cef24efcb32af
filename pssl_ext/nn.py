"""Module forms of the operators: settings in the constructor, tensors in ``forward``, under the operators'
names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pssl_ext.ops.cam_compare import cam_compare
from pssl_ext.ops.cam_regions import cam_regions
from pssl_ext.ops.dense_crf import dense_crf
from pssl_ext.ops.pixel_refine import pixel_refine
from pssl_ext.ops.prototype_contrast import prototype_contrast
from pssl_ext.ops.prototype_pool import prototype_pool
from pssl_ext.ops.random_walk import random_walk

__all__ = [
    "CamCompare",
    "CamRegions",
    "DenseCrf",
    "PixelRefine",
    "PrototypeContrast",
    "PrototypePool",
    "RandomWalk",
]


class _Operator(nn.Module):
    """Keeps the settings that an operator is called with, and prints them."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self._names = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in self.settings().items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class PrototypePool(_Operator):
    """``prototype_pool``: (features [B,D,h,w], regions [B,H,W] or [B,C,H,W]) to (sums [B,C,D], mass
    [B,C])."""

    def __init__(
        self,
        num_regions: int,
        *,
        normalize: bool = True,
        ignore_index: int = 255,
        align_corners: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            num_regions=num_regions,
            normalize=normalize,
            ignore_index=ignore_index,
            align_corners=align_corners,
            backend=backend,
        )

    def forward(
        self,
        features: Tensor,  # [B,D,h,w]
        regions: Tensor,  # [B,H,W] integer labels, or [B,C,H,W] soft masks
        *,
        weights: Tensor | None = None,  # [B,H,W]
    ) -> tuple[Tensor, Tensor]:  # sums [B,C,D], mass [B,C]
        return prototype_pool(features, regions, weights=weights, **self.settings())


class PrototypeContrast(_Operator):
    """``prototype_contrast`` as a loss. A ``temperature`` that is an ``nn.Parameter`` is learned, another
    tensor is a buffer."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.5,
        ignore_index: int = 255,
        align_corners: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            ignore_index=ignore_index,
            align_corners=align_corners,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        features: Tensor,  # [B,D,h,w]
        prototypes: Tensor,  # [C,D] or [B,C,D]
        regions: Tensor,  # [B,H,W]
        *,
        valid: Tensor | None = None,  # [C] or [B,C] bool
        weights: Tensor | None = None,  # [B,H,W]
    ) -> Tensor:  # [], or [B,H,W] for reduction="none"
        return prototype_contrast(
            features, prototypes, regions, valid=valid, weights=weights, **self.settings()
        )


class CamCompare(_Operator):
    """``cam_compare`` as a loss between MainNet's and SupportNet's multi-scale CAMs."""

    def __init__(self, *, attention: str = "cosine", reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__(attention=attention, reduction=reduction, backend=backend)

    def forward(
        self,
        main: Sequence[Tensor],  # S of [B,K,h_s,w_s]
        support: Sequence[Tensor],  # T of [B,K,h_t,w_t]
        image_labels: Tensor,  # [B,K]
        *,
        size: tuple[int, int],
    ) -> Tensor:  # [], or [B,K] for reduction="none"
        return cam_compare(main, support, image_labels, size=size, **self.settings())


class CamRegions(_Operator):
    """``cam_regions``: multi-scale CAMs to a class region mask."""

    def __init__(
        self,
        *,
        foreground: float = 0.3,
        background: float | None = None,
        ignore_index: int = 255,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            foreground=foreground, background=background, ignore_index=ignore_index, backend=backend
        )

    def forward(
        self,
        cams: Sequence[Tensor],  # T of [B,K,h_t,w_t]
        image_labels: Tensor,  # [B,K]
        *,
        size: tuple[int, int],
    ) -> Tensor:  # uint8 [B,H,W]
        return cam_regions(cams, image_labels, size=size, **self.settings())


class RandomWalk(_Operator):
    """``random_walk``: CAMs of one image spread along an edge map's or a feature map's affinities."""

    def __init__(
        self, *, radius: int = 5, beta: float = 10.0, log2_steps: int = 8, backend: str = "auto"
    ) -> None:
        super().__init__(radius=radius, beta=beta, log2_steps=log2_steps, backend=backend)

    def forward(
        self,
        cams: Tensor,  # [k,h,w]
        edge: Tensor | None = None,  # [h,w]
        *,
        features: Tensor | None = None,  # [D,h,w]
    ) -> Tensor:  # [k,h,w]
        return random_walk(cams, edge, features=features, **self.settings())


class PixelRefine(_Operator):
    """``pixel_refine``: masks that follow the colours of the image (PAR)."""

    def __init__(
        self,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        iterations: int = 10,
        colour_scale: float = 0.3,
        position_weight: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dilations=tuple(dilations),
            iterations=iterations,
            colour_scale=colour_scale,
            position_weight=position_weight,
            backend=backend,
        )

    def forward(
        self,
        images: Tensor,  # [B,3,H,W]
        masks: Tensor,  # [B,k,h,w]
    ) -> Tensor:  # [B,k,H,W]
        return pixel_refine(images, masks, **self.settings())


class DenseCrf(_Operator):
    """``dense_crf``: class probabilities refined by the image's colours."""

    def __init__(
        self,
        *,
        iterations: int = 10,
        gaussian: tuple[float, float] = (3.0, 3.0),
        bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
        backend: str = "auto",
    ) -> None:
        super().__init__(iterations=iterations, gaussian=gaussian, bilateral=bilateral, backend=backend)

    def forward(
        self,
        images: Tensor,  # uint8 [B,3,H,W]
        probabilities: Tensor,  # [B,C,H,W]
    ) -> Tensor:  # [B,C,H,W]
        return dense_crf(images, probabilities, **self.settings())

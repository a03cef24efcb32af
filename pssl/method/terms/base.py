"""What a term of the loss is, and what it sees of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pssl.method.support import SupportNet
from pssl.models.cam_net import CamNet, CamOutput
from pssl.models.prototypes import Prototypes

if TYPE_CHECKING:
    from pssl.method.terms.registry import MethodConfig


@dataclass(frozen=True)
class Setting:
    """What the terms of an arm are made for: K classes, D channels, the side of the square training images, and the
    whole method's configuration, for terms that read another's."""

    classes: int
    dim: int
    size: int
    method: MethodConfig


@dataclass(frozen=True)
class Nets:
    """The networks between two epochs; `prototypes` finds those of MainNet over the training split."""

    main: CamNet
    support: SupportNet | None
    prototypes: Callable[[], Prototypes]


@dataclass
class Step:
    """One step as the terms see it.

    `main` and `support` are the outputs by scale of MainNet and, without gradient, of SupportNet; `pixels` [B,3,H,W] in
    0..1 what they were shown, for terms that look at colours; `views` the scales that count as views of the image, 1
    first; `terms` all terms of the arm, those included that this epoch leaves out.
    """

    main: dict[float, CamOutput]
    support: dict[float, CamOutput]
    image_labels: Tensor
    pixels: Tensor | None
    views: tuple[float, ...]
    terms: Mapping[str, Term]
    _found: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, computed for the first term that asks and shared with the others."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]


class Term(nn.Module):
    """A term of the loss. Buffers belong to the training state; there are no parameters.

    Args:
        config: of the class `Config`, a dataclass with at least `weight`; with `from_epoch`, the first epoch of an arm,
            counted from 0, in which the term takes part.
        setting: what the term is made for.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    needs: ClassVar[tuple[str, ...]] = ()
    """Terms without which this one has no meaning."""
    mean_of_images: ClassVar[bool] = True
    """The loss is a mean over this rank's images. A term that sees to its share in the mean over all ranks itself says
    False."""

    def __init__(self, config: Any, setting: Setting) -> None:
        super().__init__()
        self.config = config
        self.setting = setting

    @classmethod
    def check(cls, config: Any, method: MethodConfig) -> None:
        """Raise InputError for settings that do not fit each other, before anything is trained by them."""

    @property
    def main_scales(self) -> tuple[float, ...]:
        """Scales that MainNet is shown for this term, beside 1."""
        return ()

    @property
    def views(self) -> tuple[float, ...]:
        """Those of `main_scales` that are views of the image, which classification classifies too."""
        return ()

    @property
    def support_scales(self) -> tuple[float, ...]:
        """Scales that SupportNet is shown for this term; none needs no SupportNet."""
        return ()

    @property
    def from_epoch(self) -> int:
        """First epoch of an arm in which the term takes part."""
        return getattr(self.config, "from_epoch", 0)

    def equip(self, net: CamNet, seed: int) -> None:
        """Give MainNet what the term needs of it, before SupportNet is made."""

    def before_epoch(self, epoch: int, nets: Nets) -> None:
        """Do what is to be done between two epochs of an arm."""

    def weight(self, step: Step) -> float:
        """Return the factor of the loss in the total of this step."""
        return self.config.weight

    def forward(self, step: Step) -> Tensor:
        """Return the loss, a float32 scalar, without its weight."""
        raise TypeError(f"{type(self).__name__}: expected a forward of its own")

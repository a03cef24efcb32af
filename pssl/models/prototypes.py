"""Class prototypes of a data set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prototypes:
    """Class prototypes of a data set: `rows` [C,D] L2-normalised, `valid` bool [C], `temperature` of the softmax."""

    rows: Tensor
    valid: Tensor
    temperature: float

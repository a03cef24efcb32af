"""The arms: what can be trained and compared, and the terms of the loss of each."""

from __future__ import annotations

ARMS: dict[str, tuple[str, ...]] = {
    "classifier": (),
    "classifier_long": (),
    "rcm": ("rcm",),
    "mam": ("mam",),
    "rcm+mam": ("rcm", "mam"),
    "pssl": ("rcm", "mam"),
    "seam": ("seam",),
    "ppc": ("seam", "ppc"),
}
"""The terms beside classification of every arm; a term is the file of that name in :mod:`pssl.method.terms`.

"classifier" is stage 1, which the others go on from: "classifier_long" for as many steps as they do, "pssl" is the
paper's name of rcm+mam, "seam" (Wang et al. 2020) and "ppc" (Du et al. 2022, on top of SEAM) are baselines."""

DEFAULT_ARMS = ("classifier", "classifier_long", "rcm", "mam", "rcm+mam")
"""What is trained by default: stage 1 alone, stage 1 carried on for as many steps as the other arms, and stage 1
followed by training with RCM, MAM or both."""


def terms_of(arm: str) -> tuple[str, ...]:
    """Return the names of an arm's terms, classification first."""
    return ("classification", *ARMS[arm])


def known_terms() -> tuple[str, ...]:
    """Return the names of all terms of all arms, in the order in which the arms name them."""
    return tuple(dict.fromkeys(term for arm in ARMS for term in terms_of(arm)))

"""The terms of the loss: a file each, with its configuration, its scales, its loss and its weight.

A new term is a file here, named like the term, and its name in a line of :data:`pssl.method.arms.ARMS`. It is then a
section of the configuration (``method.<term>``), trained, logged, plotted and resumed. A term that lives elsewhere is
registered by the same decorator, :func:`register`.
"""

from __future__ import annotations

import importlib

from pssl.method.arms import known_terms
from pssl.method.terms.base import Nets, Setting, Step, Term
from pssl.method.terms.registry import TERMS, MethodConfig, SupportConfig, register

for _name in known_terms():
    importlib.import_module(f"{__name__}.{_name}")

__all__ = ["TERMS", "MethodConfig", "Nets", "Setting", "Step", "SupportConfig", "Term", "register"]

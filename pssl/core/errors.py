"""Errors that a person can mend: about input, configuration, files and what is installed.

A command ends them in one line; all others are faults of this package and end in a traceback (:mod:`pssl.cli`).
"""

from __future__ import annotations


class InputError(ValueError):
    """A value, a file's content or a setting that cannot be used; the text names it, what was expected, what came."""


class MissingPackage(ImportError):
    """A package that is not installed; the text says how to install it."""

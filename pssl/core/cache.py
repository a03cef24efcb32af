"""Where pssl keeps files that it can make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """The cache folder: ``$PSSL_CACHE``, else ``$XDG_CACHE_HOME/pssl``, else ``~/.cache/pssl``.

    The folder is not created here. As the XDG base directory specification asks, a relative or empty
    ``XDG_CACHE_HOME`` is passed over. A relative ``PSSL_CACHE`` is taken from the working directory.
    """
    own = os.environ.get("PSSL_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "pssl"

"""``python -m pssl.data.synthetic OUT``: write the synthetic data set."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import tyro

from .creatures import CLASSES
from .folder import SyntheticConfig, write_synthetic


def write(
    out: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[SyntheticConfig],
) -> int:
    """Write the synthetic data set as a VOC 2012 folder.

    Args:
        out: the folder to make; it must not exist, or be empty.
        config: what to write.
    """
    try:
        write_synthetic(out, config)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    made = ", ".join(f"{field.name} {getattr(config, field.name)}" for field in fields(config))
    print(f"{out}: {made}; {len(CLASSES)} classes: {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(write, prog="python -m pssl.data.synthetic"))

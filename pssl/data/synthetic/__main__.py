"""``python -m pssl.data.synthetic OUT``: write the synthetic data set."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from pssl.cli import command
from pssl.config.values import PART
from pssl.core.log import Log
from pssl.data.synthetic.creatures import CLASSES
from pssl.data.synthetic.folder import SyntheticConfig, write_synthetic


@dataclass
class WriteConfig:
    """`python -m pssl.data.synthetic OUT`: the synthetic data set as a VOC 2012 folder."""

    out: tyro.conf.Positional[Path] = tyro.MISSING
    """The folder to make; it must not exist, or be empty."""
    set: Annotated[SyntheticConfig, PART] = field(default_factory=SyntheticConfig)


@command("pssl.data.synthetic", WriteConfig)
def run(config: WriteConfig, log: Log) -> None:
    """Write the data set."""
    write_synthetic(config.out, config.set)
    made = ", ".join(f"{item.name} {getattr(config.set, item.name)}" for item in fields(config.set))
    log.say(f"{config.out}: {made}; {len(CLASSES)} classes: {', '.join(CLASSES)}")


if __name__ == "__main__":
    run.main()

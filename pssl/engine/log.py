"""What a run says while it works: progress bars on a terminal, lines elsewhere; losses as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pssl.engine.distributed import is_first

LOSS_COLUMNS = ("stage", "epoch", "step", "lr", "classification", "rcm", "mam", "seam", "ppc", "total")


class Log:
    """Console and loss file of one run; silent on all ranks but the first."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=not is_first())
        if console is None and not self.console.is_terminal:
            self.console = Console(quiet=not is_first(), width=110)
        self.losses: list[dict] = []

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """A bar of `total` steps; where there is no terminal, one line at the end."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield Bar(progress, progress.add_task(f"{title:<24}", total=total, note=""))

    def take_losses(self, stage: str, values: dict[str, float]) -> None:
        """Remember one step's losses for :meth:`write_losses`."""
        self.losses.append({"stage": stage, **values})

    def write_losses(self, path: Path) -> None:
        """Write all steps' losses, one row a step."""
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, LOSS_COLUMNS)
            writer.writeheader()
            writer.writerows(self.losses)


class Bar:
    """One progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def reach(self, count: int, note: str | None = None) -> None:
        """`count` steps are done in all; `note` stands beside the bar, None leaves what stood there."""
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, completed=count, **fields)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more steps are done; `note` stands beside the bar."""
        self._progress.update(self._task, advance=count, note=note)

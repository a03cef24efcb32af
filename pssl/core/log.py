"""Log of a run: progress bars on a terminal, lines elsewhere; losses as CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pssl.core.errors import MissingPackage
from pssl.core.files import write_atomically
from pssl.core.ranks import is_first

STEP_COLUMNS = ("stage", "epoch", "step", "lr")
"""What losses.csv says of a step before its losses, which are named by who computes them; their sum comes last."""
LINE_EVERY = 60.0  # seconds, where there is no terminal to draw a bar on


class Log:
    """Log of a run: progress bars, messages, losses. Silent on all ranks but the first."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=not is_first())
        if console is None and not self.console.is_terminal:
            self.console = Console(quiet=not is_first(), width=110)
        self.losses: list[dict] = []
        self._writer = None
        self._said: set[str] = set()

    def stage(self) -> Log:
        """Return a log of its own for a stage of this run: losses apart, the same console, nothing said twice."""
        log = Log(self.console)
        log._said = self._said
        return log

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        """Print one line, unless this run has said it before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """Show a bar of `total` steps; where there is no terminal, a line a minute and one at the end."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield Bar(progress, progress.add_task(f"{title:<24}", total=total, note=""))

    def open_tensorboard(self, folder: Path) -> None:
        """Have :meth:`plot` write for TensorBoard too. Raises MissingPackage without the extra."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackage(
                f"engine.tensorboard: tensorboard cannot be imported ({error}); `pip install pssl[tensorboard]`"
            ) from error
        self._writer = SummaryWriter(folder)

    def plot(self, stage: str, values: dict[str, float]) -> None:
        """Plot one step's losses for TensorBoard, if it is open."""
        if self._writer is not None:
            for name in values.keys() - {"epoch", "step"}:
                self._writer.add_scalar(f"{name}/{stage}", values[name], int(values["step"]))

    def take_losses(self, stage: str, history: list[dict[str, float]]) -> None:
        """Remember a stage's losses, one entry a step, for :meth:`write_losses`."""
        self.losses += [{"stage": stage, **values} for values in history]
        if self._writer is not None:
            self._writer.flush()

    def write_losses(self, path: Path) -> None:
        """Write all steps' losses so far, one row a step."""
        stream = io.StringIO(newline="")
        names = dict.fromkeys(name for row in self.losses for name in row if name not in STEP_COLUMNS)
        losses = sorted(names, key=lambda name: name == "total")
        writer = csv.DictWriter(stream, (*STEP_COLUMNS, *losses))
        writer.writeheader()
        writer.writerows(self.losses)
        write_atomically(path, lambda partial: partial.write_bytes(stream.getvalue().encode()))


class Bar:
    """One progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._begin: tuple[float, float] | None = None  # when the first step was done, and how many were then
        self._said = time.monotonic()

    def reach(self, count: int, note: str | None = None) -> None:
        """`count` steps are done in all; `note` stands beside the bar, None leaves what stood there."""
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, completed=count, **fields)
        self._say()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more steps are done; `note` stands beside the bar."""
        self._progress.update(self._task, advance=count, note=note)
        self._say()

    def _say(self) -> None:
        """Where there is no bar to see, how far it is, if a minute has gone since that was said."""
        task, now = self._progress.tasks[self._task], time.monotonic()
        if self._begin is None:  # steps that were resumed are done in no time
            self._begin = now, task.completed
        console = self._progress.console
        if console.is_terminal or task.completed >= task.total or now - self._said < LINE_EVERY:
            return
        self._said = now
        gone, steps = now - self._begin[0], task.completed - self._begin[1]
        left = f", {gone / steps * (task.total - task.completed):.0f} s left" if steps else ""
        text = f"{task.description} {task.completed:.0f}/{task.total:.0f}  {task.fields['note']}".rstrip()
        console.print(f"{text}{left}", highlight=False, soft_wrap=True)

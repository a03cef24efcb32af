"""Tables of a report as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A text, and its class in the style sheet: "text", "best" or none."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A row of headings, and the rows below it."""

    head: list[Cell]
    rows: list[list[Cell]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int] = ()) -> Table:
    """Return a table whose highest numbers stand out in the columns `best`. Columns without numbers are set as text."""
    numbers = [[_number(row[column]) for row in rows] for column in range(len(head))]
    words = [all(number is None for number in column) for column in numbers]
    highest = {}
    for column in best:
        known = [number for number in numbers[column] if number is not None]
        highest[column] = max(known) if len(known) > 1 else None

    def cell(row: int, column: int) -> Cell:
        number = numbers[column][row]
        best_one = number is not None and number == highest.get(column)
        return Cell(rows[row][column], "best" if best_one else "text" if words[column] else "")

    return Table(
        [Cell(name, "text" if text else "") for name, text in zip(head, words, strict=True)],
        [[cell(row, column) for column in range(len(head))] for row in range(len(rows))],
    )


def _number(cell: str) -> float | None:
    """Return the number that a cell begins with."""
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return None

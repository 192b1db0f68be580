"""Heat maps of a report, and its confusion matrix: which cells they have and how dark these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .summary import ClassScore, Confusion, Spread, Summary
from .tables import percent, short, title

MOST_CLASSES = 20
"""classes in the confusion matrix"""


@dataclass(frozen=True)
class Cell:
    """One cell. style: CSS classes; "h0" to "h10" are shades from light to dark."""

    text: str
    tip: str
    style: str


@dataclass(frozen=True)
class Header:
    text: str
    tip: str


@dataclass(frozen=True)
class HeatMap:
    """A table whose cells are shaded by value. Rows may be shorter than the header.

    Attributes:
        label: Its text alternative.
        corner: The header of the column of row headers.
        tall: Whether column headers are written upwards.
        range: The lowest and the highest number, as shown; empty unless cells differ.
    """

    label: str
    corner: str
    columns: tuple[Header, ...]
    rows: tuple[tuple[Header, tuple[Cell, ...]], ...]
    tall: bool = False
    range: tuple[str, ...] = ()


def accuracy_matrix(run: Summary) -> HeatMap:
    """R[i][j], a row after each task."""
    columns = [Header(str(t.task), f"{title(t)}: {t.test_images} test images") for t in run.tasks]
    rows = [
        (
            Header(title(task), title(task)),
            [
                (
                    value,
                    percent(value),
                    f"after task {task.task}, on task {seen.task}: "
                    + ("not known" if value is None else f"{percent(value)} %")
                    + f" of {count} test images",
                )
                for value, count, seen in zip(cells, counts, run.tasks)
            ],
        )
        for task, cells, counts in zip(run.tasks, run.matrix, run.counted)
    ]
    return _shaded("Accuracy matrix", columns, rows)


def magnitudes(run: Summary) -> HeatMap:
    """The mean magnitude of each direction (column) after each task (row)."""
    spreads = run.magnitudes
    largest = max((abs(s.mean) for row in spreads for s in row), default=0.0) or 1.0
    digits = min(max(2 - math.floor(math.log10(largest)), 2), 9)
    columns = [Header(str(k), f"direction of task {k}") for k in range(1, len(spreads) + 1)]
    rows = [
        (
            Header(f"task {t}", f"task {t}"),
            [(s.mean, f"{s.mean:.{digits}f}", _spread_tip(t, k, s)) for k, s in enumerate(row, 1)],
        )
        for t, row in enumerate(spreads, 1)
    ]
    return _shaded("Magnitudes over tasks", columns, rows)


def _spread_tip(task: int, direction: int, spread: Spread) -> str:
    over = f", {spread.lowest:.4g} to {spread.highest:.4g} over the projections"
    return f"after task {task}, direction {direction}: {spread.mean:.4g}" + (
        over if spread.lowest != spread.highest else ""
    )


_Row = tuple[Header, Sequence[tuple[float | None, str, str]]]
"""header, then (value that sets the shade, text, tooltip) of each cell"""


def _shaded(label: str, columns: Sequence[Header], rows: Sequence[_Row]) -> HeatMap:
    """Shades run from the lowest value to the highest; each cell has its number."""
    known = [(value, text) for _, cells in rows for value, text, _ in cells if value is not None]
    (low, first), (high, last) = (min(known), max(known)) if known else ((0.0, ""), (0.0, ""))
    span = high - low

    def style(value: float | None) -> str:
        return "none" if value is None else _shade((value - low) / span if span else 1.0)

    drawn = tuple(
        (header, tuple(Cell(text, tip, style(value)) for value, text, tip in cells))
        for header, cells in rows
    )
    return HeatMap(label, "after", tuple(columns), drawn, range=(first, last) if span else ())


def _shade(share: float) -> str:
    return f"h{round(10 * min(max(share, 0.0), 1.0))}"


def confusion_matrix(
    scores: Sequence[ClassScore], confusions: Sequence[Confusion], most: int = MOST_CLASSES
) -> HeatMap:
    """True classes in rows, answers in columns, both in the order of the most frequent confusions.

    A run keeps its most frequent confusions only. So the last column counts the answers that the
    other columns do not show: classes left out, and rare confusions that the run did not keep.
    """
    totals = {score.name: score for score in scores}
    pairs = {(c.truth, c.predicted): c.count for c in confusions}
    confused = [name for pair in pairs for name in pair]
    shown = list(dict.fromkeys([*confused, *totals]))[:most]
    rows = []
    for truth in shown:
        score = totals.get(truth) or ClassScore(truth, 0, 0)
        counts = [score.right if p == truth else pairs.get((truth, p), 0) for p in shown]
        cells = [_count(truth, p, n, score.total) for p, n in zip(shown, counts)]
        cells.append(_count(truth, "", score.total - sum(counts), score.total))
        rows.append((Header(short(truth, 40), f"{truth}: {score.total} test images"), tuple(cells)))
    columns = [Header(short(name, 24), f"answered {name}") for name in shown]
    if any(cells[-1].text for _, cells in rows):
        columns.append(Header("other", "other wrong answers"))
    else:
        rows = [(header, cells[:-1]) for header, cells in rows]
    return HeatMap("Confusion matrix", "true class", tuple(columns), tuple(rows), tall=True)


def _count(truth: str, predicted: str, count: int, total: int) -> Cell:
    words = f"answered {predicted}" if predicted else "other wrong answers"
    share = count / total if total else 0.0
    kind = "right " if truth == predicted else "wrong "
    style = kind + _shade(share) if count else "zero"
    return Cell(str(count) if count else "", f"{truth}: {count} of {total} {words}", style)

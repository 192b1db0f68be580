"""The plain tables of a report: which columns and rows they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..metrics import FEW
from ..reliability import Calibration
from .summary import ClassScore, Summary, TaskRow

MISSING = "–"


@dataclass(frozen=True)
class Bar:
    """A cell that holds a bar. share: of the cell's width, in [0, 1]."""

    share: float


@dataclass(frozen=True)
class Table:
    """A table whose first column holds the headers of its rows.

    Attributes:
        label: Its text alternative.
        words: How many columns are text; those after them are numbers, aligned to the right.
    """

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Bar, ...], ...]
    words: int = 1


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a number in percent."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def title(task: TaskRow) -> str:
    """Number and name of a task, once if both are the same."""
    plain = task.name in (f"task {task.task}", str(task.task))
    return task.name if plain else f"{task.task} {task.name}"


def short(name: str, most: int) -> str:
    """A long name without its middle: names often differ at their end only."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def tasks(run: Summary) -> Table:
    """A row for each scored task. A column that no task has a value for is left out."""
    rows = [_task(task) for task in run.tasks]
    head = [
        name
        for name in rows[0]
        if name not in _OPTIONAL or any(row[name] != MISSING for row in rows)
    ]
    return Table(
        "Tasks",
        tuple(head),
        tuple(tuple(row[name] for name in head) for row in rows),
        words=2 + ("domain" in head),
    )


_OPTIONAL = (
    "domain",
    "last loss",
    "frozen %",
    "ECE %",
    "accepted %",
    "rank",
    "absorbed",
    "packet bytes",
)


def _task(task: TaskRow) -> dict[str, str]:
    absorbed = None if task.absorbed is None else "yes" if task.absorbed else "no"
    return {
        "task": str(task.task),
        "name": task.name,
        "domain": task.domain or MISSING,
        "accuracy %": percent(task.accuracy),
        "of images": str(task.images),
        "frozen %": percent(task.frozen),
        "ECE %": percent(task.ece),
        "accepted %": percent(task.accepted),
        "classes": str(len(task.classes)),
        "training images": str(task.training_images),
        "test images": str(task.test_images),
        "last loss": f"{task.losses[-1]:.3g}" if task.losses else MISSING,
        "rank": _known(task.rank),
        "absorbed": _known(absorbed),
        "packet bytes": _known(task.packet_bytes),
        "seconds": str(task.seconds),
    }


def _known(value: object) -> str:
    return MISSING if value is None else str(value)


def packets(run: Summary) -> Table:
    """Bytes of each packet. No row if the run recorded none."""
    sizes = [(title(t), t.packet_bytes) for t in run.tasks if t.packet_bytes is not None]
    largest = max((count for _, count in sizes), default=1)
    rows = tuple(
        (name, str(count), f"{100 * count / run.model_bytes:.2g} %", Bar(count / largest))
        for name, count in sizes
    )
    return Table("Bytes of each packet", ("task", "bytes", "of the model", ""), rows)


def classes(run: Summary) -> Table:
    """Recall of each class, worst first, with a mark on classes with few images."""
    scores = run.per_class or ()
    marks = [few(score) for score in scores]
    rows = tuple(
        (
            s.name,
            percent(s.right / s.total),
            f"{s.right} of {s.total}",
            Bar(s.right / s.total),
            *((mark,) if any(marks) else ()),
        )
        for s, mark in zip(scores, marks)
    )
    more = ("few images",) if any(marks) else ()
    return Table("Recall by class", ("class", "recall %", "right", "", *more), rows)


def few(score: ClassScore) -> str:
    """Which images of a class are too few, with their number; empty if none are."""
    training = FEW if score.training is None else score.training
    found = {"test": score.total, "training": training}
    return ", ".join(f"{count} {which}" for which, count in found.items() if count < FEW)


def calibration(found: Calibration) -> Table:
    """The bins of a reliability diagram that have images, from sure answers to unsure ones."""
    edges = [f"{100 * m / len(found.bins):.0f}" for m in range(len(found.bins) + 1)]
    rows = [
        (
            f"{low} to {high} %",
            str(one.count),
            percent(one.confidence),
            percent(one.accuracy),
        )
        for one, low, high in zip(found.bins, edges, edges[1:])
        if one.count
    ]
    head = ("probability", "images", "mean %", "correct %")
    return Table("Calibration", head, tuple(reversed(rows)))


def confusions(run: Summary) -> Table:
    """The recorded confusions, most frequent first."""
    totals = {score.name: score.total for score in run.per_class or ()}
    rows = tuple(
        (
            c.truth,
            c.predicted,
            str(c.count),
            f"{100 * c.count / totals[c.truth]:.0f} %" if totals.get(c.truth) else MISSING,
        )
        for c in run.confusions or ()
    )
    return Table("Confusions", ("class", "answered", "times", "share"), rows, words=2)


def domains(run: Summary) -> Table:
    """HTER of each domain. No row if the run does not have exactly two classes."""
    rows = tuple(
        (
            d.domain,
            *(percent(rate, 2) for rate in (d.hter, d.far, d.frr)),
            MISSING if d.threshold is None else f"{d.threshold:.4g}",
        )
        for d in run.domains
    )
    return Table("HTER by domain", ("domain", "HTER %", "FAR %", "FRR %", "threshold"), rows)


def skipped(run: Summary) -> Table:
    """The first skipped files."""
    rows = tuple((f.file, f.label, f.reason, f.detail) for f in run.skipped_files)
    return Table("Skipped files", ("file", "class", "reason", "detail"), rows, words=4)


def settings(run: Summary) -> tuple[Table, ...]:
    """A table for each group of settings, then the versions that the run was made with."""
    groups = {**run.settings, **({"made with": run.versions} if run.versions else {})}
    return tuple(
        Table(
            name,
            ("setting", "value"),
            tuple((key, _setting(value)) for key, value in group.items()),
            words=2,
        )
        for name, group in groups.items()
    )


def _setting(value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return shown or MISSING


def reasons(run: Summary) -> str:
    """How many files were skipped, by reason."""
    return ", ".join(f"{count} {reason}" for reason, count in run.skipped.items())

"""Charts of the dashboard as they are drawn: no page needs a script for them.

A chart is as wide as its page. So x counts in percent of the width, and y in pixels from the top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .driver import LEAST_PREDICTIONS
from .lookups import Change, Span, Tally
from .registry import MIXED
from .schema import HOUR

HEIGHT = 200
MOST_CLASSES = 6
MOST_TASKS = 2


@dataclass(frozen=True)
class Tick:
    """A label on an axis. shown: "wide" if only wide pages show it, else empty."""

    at: float
    label: str
    shown: str = ""


@dataclass(frozen=True)
class Curve:
    """A line: the path within a width of 100, and a dot with a tooltip for each value."""

    name: str
    style: str
    path: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Mark:
    """Where devices got to a task. jump: what the unknown rate did, if that is alarming."""

    x: float
    label: str
    jump: str = ""
    turned: bool = False


@dataclass(frozen=True)
class Plot:
    """A chart of lines and marks. title and description are its text alternative."""

    title: str
    description: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...]
    height: int = HEIGHT


@dataclass(frozen=True)
class Block:
    """A part of a column."""

    x: float
    width: float
    y: float
    height: float
    style: str
    tip: str


@dataclass(frozen=True)
class Stack:
    """Columns of shares. legend: name, style and share over the whole span, in percent."""

    title: str
    description: str
    x_ticks: tuple[Tick, ...]
    blocks: tuple[Block, ...]
    legend: tuple[tuple[str, str, str], ...]
    height: int = HEIGHT


def unknown_plot(
    by_task: Mapping[int, Mapping[int, Tally]],
    found: Sequence[Change],
    span: Span,
    jump: float,
) -> Plot | None:
    """The unknown rate over time: of all predictions, and of the newest tasks alone.

    Args:
        by_task: Predictions by task and step of the span.
        found: When devices got to a task.
        span: The times shown.
        jump: Percentage points by which the unknown rate of a task may be above that of the others.

    Returns:
        None if nothing was predicted.
    """
    everything: dict[int, Tally] = {}
    for steps in by_task.values():
        for at, tally in steps.items():
            everything[at] = everything.get(at, Tally()) + tally
    if not any(tally.total for tally in everything.values()):
        return None
    rates = [t.rate or 0.0 for steps in (everything, *by_task.values()) for t in steps.values()]
    top, levels = _levels(max(rates))
    series: list[tuple[str, str, Mapping[int, Tally]]] = [("all", "own", everything)]
    tasks = sorted(task for task in by_task if task != MIXED)
    newest = tasks[-MOST_TASKS:] if len(tasks) > 1 else []
    series += [(f"task {t}", f"task{i}", by_task[t]) for i, t in enumerate(reversed(newest))]
    curves = tuple(_curve(name, style, steps, span, top) for name, style, steps in series)
    return Plot(
        title="Unknown rate over time",
        description=". ".join(f"{c.name}: {c.dots[-1][2] if c.dots else 'none'}" for c in curves),
        x_ticks=_x_ticks(span),
        y_ticks=tuple(Tick(HEIGHT * (1 - v / top), f"{100 * v:.10g} %") for v in levels),
        curves=curves,
        marks=tuple(_mark(change, by_task, span, jump) for change in found),
    )


def _levels(highest: float) -> tuple[float, list[float]]:
    """The top of a scale of shares, and its levels."""
    wanted = max(highest, 0.01) / 4
    steps = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
    step = next((s for s in steps if s >= wanted * 0.999), 0.25)
    count = min(math.ceil(max(highest, 0.01) / step - 1e-9), round(1 / step))
    return step * count, [step * k for k in range(count + 1)]


def _x(place: float, span: Span) -> float:
    return 100 * (place + 0.5) / span.count


def _curve(name: str, style: str, steps: Mapping[int, Tally], span: Span, top: float) -> Curve:
    path, pen, dots = [], "M", []
    for at in range(span.count):
        tally = steps.get(at, Tally())
        if tally.rate is None:
            pen = "M"  # a gap: the next value starts a new stroke
            continue
        x, y = _x(at, span), HEIGHT * (1 - tally.rate / top)
        path.append(f"{pen}{x:.2f} {y:.1f}")
        pen = "L"
        tip = f"{100 * tally.rate:.1f} % of {tally.total} images, {_moment(at, span)}"
        dots.append((x, y, f"{name}: {tip}"))
    whole = sum((steps[at] for at in steps if at >= 0), Tally())
    shown = f"{name}: {100 * (whole.rate or 0):.1f} %"
    return Curve(shown, style, " ".join(path), tuple(dots))


def _mark(
    change: Change, by_task: Mapping[int, Mapping[int, Tally]], span: Span, most: float
) -> Mark:
    x = min(max(100 * (change.time - span.start) / (span.width * span.count), 0.0), 100.0)
    plural = "s" if change.devices > 1 else ""
    at = span.place(change.time)
    after = _sum(by_task, at, lambda task: task == change.task)
    before = _sum(by_task, at - span.count, lambda task: MIXED < task < change.task)
    jump = ""
    if min(after.total, before.total) >= LEAST_PREDICTIONS:
        rise = 100 * ((after.rate or 0) - (before.rate or 0))
        if rise > most:
            jump = (
                f"task {change.task} answers unknown {100 * (after.rate or 0):.1f} % of the time, "
                f"{rise:.1f} points more than tasks before it ({100 * (before.rate or 0):.1f} %)"
            )
    label = f"task {change.task}: {change.devices} device{plural}"
    return Mark(x, label, jump, turned=x > 60)


def _sum(
    by_task: Mapping[int, Mapping[int, Tally]], since: int, wanted: Callable[[int], bool]
) -> Tally:
    return sum(
        (
            t
            for task, steps in by_task.items()
            if wanted(task)
            for at, t in steps.items()
            if at >= since
        ),
        Tally(),
    )


def mix_stack(by_class: Mapping[str, Mapping[int, int]], span: Span) -> Stack | None:
    """The shares of the most frequent classes over time; None if nothing was predicted."""
    totals = {name: sum(steps.values()) for name, steps in by_class.items()}
    everything = sum(totals.values())
    if everything <= 0:
        return None
    ranked = sorted((n for n in totals if n), key=lambda name: (-totals[name], name))
    shown = ranked[:MOST_CLASSES]
    rest = [name for name in totals if name not in shown and totals[name]]
    series = [(name, f"c{i}", [name]) for i, name in enumerate(shown)]
    if rest:
        series.append(("other classes", "rest", rest))
    blocks: list[Block] = []
    for at in range(span.count):
        blocks += _column(series, by_class, at, span)
    legend = tuple(
        (name, style, f"{100 * sum(totals[n] for n in names) / everything:.1f} %")
        for name, style, names in series
    )
    return Stack(
        title="Class mix over time",
        description=", ".join(f"{name} {share}" for name, _, share in legend),
        x_ticks=_x_ticks(span),
        blocks=tuple(blocks),
        legend=legend,
    )


def _column(
    series: Sequence[tuple[str, str, Sequence[str]]],
    by_class: Mapping[str, Mapping[int, int]],
    at: int,
    span: Span,
) -> list[Block]:
    values = [sum(max(0, by_class[n].get(at, 0)) for n in names) for _, _, names in series]
    total = sum(values)
    found, below = [], 0.0
    for (name, style, _), value in zip(series, values):
        if value:
            height = HEIGHT * value / total
            below += height
            tip = f"{name}: {100 * value / total:.1f} % of {total}, {_moment(at, span)}"
            width = 100 / span.count
            found.append(Block(at * width, width, HEIGHT - below, height, style, tip))
    return found


def _moment(at: int, span: Span) -> str:
    return time.strftime("%d %b %H:%M", time.gmtime(span.start + at * span.width)) + " UTC"


def _x_ticks(span: Span) -> tuple[Tick, ...]:
    """Midnights, or hours if the span is short; narrow pages show every other one."""
    seconds = span.width * span.count
    apart = next(
        hours * HOUR
        for hours in (3, 6, 12, 24, 48, 96, 168, 360, 720)
        if seconds / (hours * HOUR) <= 8 or hours == 720
    )
    form = "%H:%M" if apart < 24 * HOUR else "%d %b"
    first = -(-span.start // apart) * apart
    found = []
    for i, moment in enumerate(range(first, span.start + seconds, apart)):
        at = 100 * (moment - span.start) / seconds
        label = time.strftime(form, time.gmtime(moment))
        if 3 < at < 97:
            found.append(Tick(at, label, "wide" if i % 2 else ""))
    return tuple(found)


def width_of(value: int, total: int) -> str:
    """A share of a bar, in percent, as CSS and SVG have it."""
    return f"{100 * value / total:.2f}%" if total else "0%"

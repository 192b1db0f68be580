"""Line charts of a report: where ticks, lines and points lie.

A chart is as wide as its page. So x counts in percent of the width, and y in pixels from the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 280
MOST_POINTS = 400
"""of all lines together; a chart with more points shows only the lines"""


@dataclass(frozen=True)
class Series:
    """One line: a value, or None for a gap, and a tooltip for each place on the x axis.

    Attributes:
        style: Its CSS class.
    """

    name: str
    style: str
    values: tuple[float | None, ...]
    tips: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """The values from the bottom to the top of a chart, and the levels that get a grid line."""

    low: float
    high: float
    levels: tuple[tuple[float, str], ...]

    def y(self, value: float) -> float:
        return HEIGHT * (self.high - value) / (self.high - self.low)


@dataclass(frozen=True)
class Tick:
    """A label on an axis.

    Attributes:
        at: Its place: percent on the x axis, pixels on the y axis.
        shown: "narrow" or "wide" if only such pages show it, else empty.
    """

    at: float
    label: str
    shown: str = ""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Line:
    """A series as drawn. path: of an SVG path, with x from 0 to 100."""

    name: str
    style: str
    path: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """A line chart. title and description are its text alternative."""

    title: str
    description: str
    axis: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    legend: tuple[Line, ...]
    height: int = HEIGHT


@dataclass(frozen=True)
class Texts:
    """The words of a chart: its title, its description, the name of its x axis."""

    title: str
    description: str
    axis: str


def chart(texts: Texts, places: Sequence[int], scale: Scale, series: Sequence[Series]) -> Chart:
    """Lay out a chart whose x axis has a place for each number of a task or epoch."""
    count = sum(len(one.values) for one in series)
    lines = tuple(_line(one, len(places), scale, count <= MOST_POINTS) for one in series)
    return Chart(
        title=texts.title,
        description=texts.description,
        axis=texts.axis,
        x_ticks=_x_ticks(places),
        y_ticks=tuple(Tick(scale.y(value), label) for value, label in scale.levels),
        lines=lines,
        legend=lines if len(lines) <= 10 else _some(lines, 5),
    )


def fractions(values: Sequence[float | None]) -> Scale:
    """A scale in percent up to 100 %, from the tenth below the lowest value."""
    known = [value for value in values if value is not None]
    low = min(math.floor(10 * min(known, default=0.0)) / 10, 0.9)
    step = 0.1 if 1 - low <= 0.5 else 0.2
    levels = [1 - step * k for k in range(int((1 - low) / step + 1e-9) + 1)]
    return Scale(low, 1.0, tuple((level, f"{100 * level:.0f} %") for level in levels))


def from_zero(values: Sequence[float]) -> Scale:
    """A scale from 0 to at least the highest value, with four to ten round levels."""
    high = max(values, default=0.0) or 1.0
    step = _round_up(high / 5)
    count = math.ceil(high / step - 1e-9)
    return Scale(0.0, count * step, tuple((step * k, f"{step * k:.10g}") for k in range(count + 1)))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... and of their tenths, hundredths, ..."""
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= value * (1 - 1e-9))


def _x(i: int, count: int) -> float:
    return 100 * i / (count - 1) if count > 1 else 50.0


def _x_ticks(places: Sequence[int]) -> tuple[Tick, ...]:
    """About 8 labels for a telephone, 25 for a desk, at multiples of a round number."""
    narrow, wide = (max(1, int(_round_up(len(places) / most))) for most in (8, 25))
    found = []
    for i, place in enumerate(places):
        on_narrow, on_wide = place % narrow == 0, place % wide == 0
        if on_narrow or on_wide:
            shown = "" if on_narrow and on_wide else "narrow" if on_narrow else "wide"
            found.append(Tick(_x(i, len(places)), str(place), shown))
    return tuple(found)


def _line(series: Series, places: int, scale: Scale, marked: bool) -> Line:
    path, pen, points = [], "M", []
    for i, (value, tip) in enumerate(zip(series.values, series.tips)):
        if value is None:
            pen = "M"  # a gap: the next point starts a new stroke
            continue
        point = Point(_x(i, places), scale.y(value), tip)
        path.append(f"{pen}{point.x:.2f} {point.y:.1f}")
        pen = "L"
        points.append(point)
    return Line(series.name, series.style, " ".join(path), tuple(points) if marked else ())


def _some(lines: tuple[Line, ...], count: int) -> tuple[Line, ...]:
    """The first, the last, and evenly spread ones between."""
    return tuple(lines[round(i * (len(lines) - 1) / (count - 1))] for i in range(count))

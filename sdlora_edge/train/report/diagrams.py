"""The reliability diagram of a report: where its bars lie.

As in `charts`, x counts in percent of the width, and y in pixels from the top.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..metrics import FEW
from ..reliability import Bin, Calibration
from .charts import HEIGHT, Tick
from .tables import percent

COUNTS, SPACE = 60, 20
"""height of the bars that count images, and of the space above them"""


@dataclass(frozen=True)
class Column:
    """A bar. style: its CSS class."""

    x: float
    width: float
    y: float
    height: float
    tip: str
    style: str


@dataclass(frozen=True)
class Diagram:
    """Two rows of bars over the probabilities from 0 to 100 %.

    Attributes:
        title, description: Its text alternative.
        accuracy: A bar for each bin that has images, in the first HEIGHT pixels.
        counts: Below it, a bar for the number of images.
        most: Number of images of the highest of these.
        few: Whether a bar has the style "few".
        foot: y of the x axis.
    """

    title: str
    description: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    accuracy: tuple[Column, ...]
    counts: tuple[Column, ...]
    most: int
    few: bool
    top: int = HEIGHT
    foot: int = HEIGHT + SPACE + COUNTS


def reliability_diagram(found: Calibration) -> Diagram:
    """Lay out accuracy over probability. Bars of fewer than FEW images are hollow."""
    width, most = 100 / len(found.bins), max(one.count for one in found.bins)
    filled = [(m, one) for m, one in enumerate(found.bins) if one.count]
    foot = HEIGHT + SPACE + COUNTS

    def column(m: int, one: Bin, height: float, base: int) -> Column:
        style = "few" if one.count < FEW else "own"
        return Column(m * width, width, base - height, height, _tip(one), style)

    steps = range(0, 101, 20)
    return Diagram(
        title="Reliability diagram",
        description=". ".join(_tip(one) for _, one in filled),
        x_ticks=tuple(Tick(step, f"{step} %") for step in steps),
        y_ticks=tuple(Tick(HEIGHT * (100 - step) / 100, f"{step} %") for step in steps),
        accuracy=tuple(column(m, one, HEIGHT * one.accuracy, HEIGHT) for m, one in filled),
        counts=tuple(column(m, one, COUNTS * one.count / most, foot) for m, one in filled),
        most=most,
        few=any(one.count < FEW for _, one in filled),
    )


def _tip(one: Bin) -> str:
    return (
        f"mean probability {percent(one.confidence)} %: {percent(one.accuracy)} % of "
        f"{one.count} images correct"
    )

"""Counts of predictions: by class, unknown ones, and the sum of their confidences. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..device.answers import Prediction
from ..formats.canonical import LARGEST
from ..formats.fields import Kind, mapped, record, whole
from ..results import Result

CONFIDENCE = 10_000
"""A confidence of 1, as JSON holds it."""
MOST_CLASSES = 1000
"""Classes that are counted apart; the rarer ones are counted together."""


@dataclass(frozen=True)
class Counts(Result):
    """How many images were predicted as what.

    Attributes:
        total: Number of images.
        unknown: Of them, those of no known class.
        confidence: Sum over all images of the best class's probability times CONFIDENCE.
        by_class: {class: number of images}; unknown images are not in it.
        other: Number of images of the classes that are not in `by_class`.
    """

    total: int = 0
    unknown: int = 0
    confidence: int = 0
    by_class: Mapping[str, int] = field(default_factory=dict)
    other: int = 0

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> Counts:
        """Count predictions."""
        found = list(predictions)
        return cls(
            total=len(found),
            unknown=sum(not p.known for p in found),
            confidence=sum(_confidence(p) for p in found),
            by_class=Counter(p.label for p in found if p.known),
        )

    def __add__(self, more: Counts) -> Counts:
        classes = Counter(self.by_class)
        classes.update(more.by_class)
        ranked = sorted(classes.items(), key=lambda entry: (-entry[1], entry[0]))
        rest = sum(n for _, n in ranked[MOST_CLASSES:])
        return Counts(
            total=self.total + more.total,
            unknown=self.unknown + more.unknown,
            confidence=self.confidence + more.confidence,
            by_class=dict(ranked[:MOST_CLASSES]),
            other=self.other + more.other + rest,
        )

    @property
    def confidence_1e4(self) -> int:
        """Mean confidence times 10,000; 0 if nothing was counted."""
        return min(CONFIDENCE, round(self.confidence / self.total)) if self.total else 0


def _confidence(prediction: Prediction) -> int:
    value = prediction.confidence
    return round(min(value, 1.0) * CONFIDENCE) if value > 0 else 0  # NaN is not above 0


_COUNT = whole(0, LARGEST)
COUNTS: Kind = record(
    {
        "total": _COUNT,
        "unknown": _COUNT,
        "confidence": _COUNT,
        "by_class": mapped(_COUNT),
        "other": _COUNT,
    }
)


def as_counts(value: Any) -> Counts:
    """JSON as Counts. Raises ValueError, and what a `Kind` raises."""
    COUNTS(value)
    return Counts(**value)

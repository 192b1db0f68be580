"""Proof that an exported model computes what torch computes, and the same proof for a whole fleet's worth of packets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import HealthError
from ..train.evaluator import host_logits

BATCH = 64
__all__ = ["BATCH", "Parity", "compare", "host_logits"]


@dataclass(frozen=True)
class Parity:
    """images: how many were compared. same_top: how many have the same argmax on both sides. difference: the largest
    absolute logit difference; largest: the largest absolute logit of the reference."""

    images: int
    same_top: int
    difference: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        agreement = self.same_top / self.images
        return {
            "images": self.images,
            "agreement": agreement,
            "largest_difference": self.difference,
            "largest_logit": self.largest,
        }

    def require(self, tolerance: float, agreement: float, unit: float, what: str) -> Parity:
        """Raises HealthError unless logits are within the tolerance, which is meant for logits up to `unit` and grows with larger
        ones, and a share of `agreement` of the images has the same argmax."""
        allowed = tolerance * max(1.0, self.largest / unit)
        if not (self.difference <= allowed and self.same_top >= agreement * self.images):
            raise HealthError(
                f"{what} does not compute what torch computes: logits differ by {self.difference:.2g} (allowed {allowed:.2g}), "
                f"{self.images - self.same_top} of {self.images} images get another class "
                f"(agreement {self.same_top / self.images:.1%}, required {agreement:.1%})"
            )
        return self


def compare(ours: np.ndarray, reference: np.ndarray) -> Parity:
    """Two sets of logits, float32 (N, classes)."""
    largest = float(np.abs(reference).max(initial=0.0))
    if ours.shape != reference.shape or not np.isfinite(ours).all():
        return Parity(len(reference), 0, float("inf"), largest)
    difference = float(np.abs(ours - reference).max(initial=0.0))
    return Parity(
        len(reference),
        int((ours.argmax(axis=1) == reference.argmax(axis=1)).sum()),
        difference,
        largest,
    )

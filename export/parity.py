"""Proof that an exported model computes what torch computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HealthError
from ..results import Result
from ..train.evaluator import host_logits

BATCH = 64
__all__ = ["BATCH", "CheckedBundle", "Parity", "compare", "host_logits"]


@dataclass(frozen=True)
class Parity(Result):
    """How two sets of logits compare.

    Attributes:
        images: how many were compared.
        same_top: how many of them have the same argmax on both sides.
        difference: largest absolute logit difference.
        largest: largest absolute logit of the reference.
    """

    images: int
    same_top: int
    difference: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """`same_top` as a share of the images, and the rest."""
        return {
            "images": self.images,
            "agreement": self.same_top / self.images,
            "largest_difference": self.difference,
            "largest_logit": self.largest,
        }

    def require(self, tolerance: float, agreement: float, unit: float, what: str) -> Parity:
        """Return this if it is within the bounds.

        Args:
            tolerance: largest logit difference, for logits up to `unit`. It grows with larger ones.
            agreement: smallest share of images with the same argmax.
            unit: see `tolerance`.
            what: is compared, for the message.

        Raises:
            HealthError: it is not.
        """
        allowed = tolerance * max(1.0, self.largest / unit)
        if not (self.difference <= allowed and self.same_top >= agreement * self.images):
            raise HealthError(
                f"{what} does not compute what torch computes: logits differ by "
                f"{self.difference:.2g} (allowed {allowed:.2g}), "
                f"{self.images - self.same_top} of {self.images} inputs get another class "
                f"(agreement {self.same_top / self.images:.1%}, required {agreement:.1%})"
            )
        return self


@dataclass(frozen=True)
class CheckedBundle(Result):
    """A bundle that was compared with its run."""

    bundle: Path
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """One level: the parity's facts stand beside the bundle."""
        return {"bundle": str(self.bundle), **self.parity.to_dict()}


def compare(ours: np.ndarray, reference: np.ndarray) -> Parity:
    """Compare two sets of logits, float32 (N, classes)."""
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

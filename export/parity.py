"""Proof that an exported model computes what torch computes, and the same proof for a whole fleet's worth of packets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import HealthError
from ..method import sdlora
from ..train.run import Run

BATCH = 64


@dataclass(frozen=True)
class Parity:
    """pictures: how many were compared. difference: the largest absolute logit difference. same_top: how many have the
    same argmax on both sides."""

    pictures: int
    difference: float
    same_top: int

    def require(self, tolerance: float, what: str) -> Parity:
        """Raises HealthError unless within the tolerance, with the same argmax everywhere."""
        if not (self.difference <= tolerance and self.same_top == self.pictures):
            raise HealthError(
                f"{what} does not compute what torch computes: logits differ by {self.difference:.2g} (allowed {tolerance:g}), "
                f"{self.pictures - self.same_top} of {self.pictures} pictures get another class; nothing was written"
            )
        return self


def compare(ours: np.ndarray, reference: np.ndarray) -> Parity:
    """Two sets of logits, float32 (N, classes)."""
    if ours.shape != reference.shape or not np.isfinite(ours).all():
        return Parity(len(reference), float("inf"), 0)
    difference = float(np.abs(ours - reference).max(initial=0.0))
    return Parity(len(reference), difference, int((ours.argmax(axis=1) == reference.argmax(axis=1)).sum()))


def host_logits(run: Run, task: int, inputs: np.ndarray) -> np.ndarray:
    """What torch gets after a task, in float64: float32 (N, 3, size, size), preprocessed, to logits float32 (N, classes)."""
    weights, state = run.weights(task), run.states[task]
    parts = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
    return np.concatenate([sdlora.logits(run.backbone, weights, state, part, exact=True) for part in parts])

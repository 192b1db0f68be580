"""The canary: inputs made from a seed. Their outputs prove that a device computes as the host."""

from __future__ import annotations

import numpy as np

from ..errors import HealthError
from .modality import Preparation

COUNT = 2


def inputs(seed: int, prepare: Preparation, count: int = COUNT) -> dict[str, np.ndarray]:
    """What the model reads of `count` items that are drawn from a seed (`Preparation.canary`)."""
    return prepare.canary(seed, count)


def largest_difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference, divided by the largest expected logit (at least 1).

    Rounding errors grow with the logits, so a relative bound fits every model and processor.
    Infinite if shapes differ or a value is not finite.
    """
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        return float("inf")
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(np.abs(logits - expected).max(initial=0.0)) / scale


def check(
    logits: np.ndarray, expected: np.ndarray, tolerance: float, task: int, advice: str = ""
) -> float:
    """The largest difference, as `largest_difference` measures it.

    Args:
        logits: float32 (count, live classes), what this device computed.
        expected: The same of the host.
        tolerance: The largest difference allowed.
        task: Number of the task, for the message.
        advice: What to try on this machine, for the message.

    Raises:
        HealthError: The difference exceeds the tolerance, or is not a number.
    """
    difference = largest_difference(logits, expected)
    if not difference <= tolerance:
        raise HealthError(
            f"canary of task {task} failed: logits differ by {difference:.2g}, "
            f"more than {tolerance:g}; "
            "the generation before it stays in force" + (f"; {advice}" if advice else "")
        )
    return difference

"""The canary: inputs made from a seed. Their outputs prove that a device computes as the host."""

from __future__ import annotations

import hashlib

import numpy as np

from ..errors import HealthError
from .image import Preprocessing

COUNT = 2
CELLS = 8


def inputs(seed: int, preprocessing: Preprocessing, count: int = COUNT) -> np.ndarray:
    """CELLS x CELLS coloured cells drawn by SHAKE-256, equal on every machine.

    Args:
        seed: Of the colours.
        preprocessing: Of the model.
        count: Number of inputs.

    Returns:
        float32 (count, 3, size, size).
    """
    size = preprocessing.size
    stream = hashlib.shake_256(b"sdlora-edge canary %d" % seed).digest(count * CELLS * CELLS * 3)
    cells = np.frombuffer(stream, np.uint8).reshape(count, CELLS, CELLS, 3)
    index = np.arange(size) * CELLS // size
    return preprocessing.normalise(cells[:, index][:, :, index])


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

"""What a tensor from outside must be: its dtype, its shape and the bounds of its values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .canonical import UNIT
from .confidence import (
    BIAS,
    MEAN,
    PRECISION,
    SCALE,
    TEMPERATURE,
    THRESHOLD,
    WEIGHT,
    Confidence,
)
from .limits import LIMITS

LARGEST_SCALE = LIMITS.magnitude / 128
"""A scale is multiplied with integers down to -128."""
LARGEST_HALF = 65504.0
"""The largest float16."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """A tensor, and what it must be.

    Attributes:
        name: Of the tensor, for messages.
        array: The tensor.
        dtype: The only dtype it may have.
        shape: The only shape it may have.
        least: The smallest value.
        most: The largest value.
    """

    name: str
    array: np.ndarray
    dtype: Any
    shape: tuple[int, ...]
    least: float = -LIMITS.magnitude
    most: float = LIMITS.magnitude

    @property
    def problem(self) -> str:
        """What is wrong with the tensor; empty if nothing is."""
        array = self.array
        if array.dtype != self.dtype or array.shape != self.shape:
            return (
                f"{self.name} is {array.dtype}{array.shape}, not {np.dtype(self.dtype)}{self.shape}"
            )
        if array.size and not self._within:
            return f"{self.name} holds NaN, infinity or a value out of bounds"
        return ""

    @property
    def _within(self) -> bool:
        """Whether every value is within the bounds; NaN is not."""
        array, most = self.array, np.float16(min(self.most, LARGEST_HALF))
        if array.dtype != np.float16 or self.least != -self.most or most != self.most:
            return bool(array.min() >= self.least and array.max() <= self.most)
        # Without its sign bit, a float16 is an integer of the same order, with infinity and NaN at
        # the end. numpy compares those twenty times as fast: a device spends a third of a long
        # catch-up here otherwise.
        return bool((array.view(np.uint16) & 0x7FFF).max() <= most.view(np.uint16))


def scale_bounds(name: str, array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> Bounds:
    """Of a tensor of scales, which are never negative."""
    return Bounds(name, array, dtype, shape, 0.0, LARGEST_SCALE)


def confidence_bounds(confidence: Confidence, live: int, features: int) -> Iterator[Bounds]:
    """Of what a state with so many live rows, of so many features, knows of its own answers."""
    k = min(len(confidence.scale), LIMITS.components) if confidence.scale.ndim else 0
    given = min(len(confidence.threshold), 1) if confidence.threshold.ndim else 0
    yield Bounds(TEMPERATURE, confidence.temperature, np.float32, (1,), UNIT)
    yield Bounds(WEIGHT, confidence.weight, np.int8, (k, live))
    yield scale_bounds(SCALE, confidence.scale, np.float32, (k,))
    yield Bounds(BIAS, confidence.bias, np.float32, (k,))
    wide = features if confidence.mean.size else 0
    yield Bounds(MEAN, confidence.mean, np.float16, (wide,))
    yield Bounds(PRECISION, confidence.precision, np.float16, (wide,), 0.0)
    most = float(LIMITS.logit)
    yield Bounds(THRESHOLD, confidence.threshold, np.float32, (given,), -most, most)

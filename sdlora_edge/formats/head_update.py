"""What a task does to the head, as it travels. numpy only.

    new row      row = scale q                             q int8 (features,), scale float32
    known row    row(t) = row(t-1) + scale (left right)    left int8 (r,), right int8 (r, features)

All known rows follow one drift of the features, so their changes are nearly a matrix of low rank:
a packet hardly grows with the number of classes that are known. The row of a known class with new
images moves by itself as well, so each of these classes may add one to the rank. The host continues
with the row that a device gets. So what truncation and rounding lose comes back with the next
change, and nothing adds up.

`left right` is a product of integers below 2^24, which float32 holds exactly. Then come exactly two
float32 roundings, so every machine gets the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .confidence import CONFIDENCE, Confidence
from .encoding import LARGEST, decode, nearest
from .limits import LIMITS

RANK = 8
"""of the step of known rows, unless the caller says more"""
NEGLIGIBLE = 1e-4
"""Share of the largest singular value below which a component is noise: int8 loses more."""


@dataclass(frozen=True, eq=False)
class Step:
    """How the change of known rows becomes a step of low rank.

    Attributes:
        rank: The largest rank, if `more` is 0.
        metric: float (features, features), the covariance of the features about `middle`: the step
            is the one whose logits are nearest. None means that of independent features.
        middle: float (features,), the mean feature, where logits come out as if nothing were
            rounded. None means 0.
        more: By how much the rank may grow above `rank`.
        allowed: The rank grows until the mean square of what a logit loses is at most this.
    """

    rank: int = RANK
    metric: np.ndarray | None = None
    middle: np.ndarray | None = None
    more: int = 0
    allowed: float = 0.0

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, features) times the covariance: float64 (n, features)."""
        found: np.ndarray = rows if self.metric is None else rows @ self.metric
        return found

    def at_middle(self, rows: np.ndarray) -> np.ndarray:
        """rows (n, features) times the mean feature: float64 (n,)."""
        if self.middle is None:
            return np.zeros(len(rows))
        found: np.ndarray = rows @ np.asarray(self.middle, np.float64)
        return found

    def kept(self, values: np.ndarray, rows: int) -> int:
        """How many components a step has.

        values: float64 (n,), by how much each adds to the squares of the logits, the largest first.
        rows: How many rows change.
        """
        real = int((values > NEGLIGIBLE**2 * values.max(initial=0.0)).sum())
        lost = values[::-1].cumsum()[::-1] / max(1, rows)  # without this component and all after it
        wanted = max(self.rank, min(int((lost > self.allowed).sum()), self.rank + self.more))
        return min(real, wanted, LIMITS.step_rank)


@dataclass(frozen=True, eq=False)
class HeadUpdate:
    """What a task does to the head: the tensors whose names begin with `head.`.

    Attributes:
        new: int8 (n, features), rows of the new classes.
        new_scale: float32 (n,). A new row is `new_scale * new`.
        new_bias: float32 (n,).
        index: int32 (m,), ascending: the known rows that change.
        left: int8 (m, r).
        right: int8 (r, features).
        scale: float32 (m,). A row changes by `scale * (left @ right)`.
        bias: float32 (m,), the new biases of those rows.
        confidence: What the state after the task knows of its answers. It replaces the old one.
    """

    new: np.ndarray
    new_scale: np.ndarray
    new_bias: np.ndarray
    index: np.ndarray
    left: np.ndarray
    right: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    confidence: Confidence

    @classmethod
    def between(
        cls,
        old: tuple[np.ndarray, np.ndarray],
        new: tuple[np.ndarray, np.ndarray],
        retired: Sequence[int] = (),
        step: Step | None = None,
        confidence: Confidence | None = None,
    ) -> HeadUpdate:
        """Find the update from one head to another, as nearly as it can be shipped.

        A row does not change if it is what its target would be after rounding to int8. So a row
        that was shipped when it was new, and whose target stays, is not listed again.

        Args:
            old: Weight (C, features) and bias (C,) of the state before the task.
            new: Weight (C + n, features) and bias (C + n,) after it, the target.
            retired: Rows that are retired by now. They never change.
            step: How changes of known rows are rounded.
            confidence: After the task. Default: nothing is known.

        Raises:
            ValueError: A number is not finite.
        """
        (old_weight, old_bias), (weight, bias) = old, new
        known, step = len(old_weight), step or Step()
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("a head row is not finite")
        weight, bias = weight.astype(np.float64), bias.astype(np.float32)
        q, q_scale = _rounded(weight[known:])
        lost = weight[known:] - decode(q, q_scale)
        moved = _moved((old_weight, old_bias), (weight[:known], bias[:known]), step)
        moved[list(retired)] = False
        index = np.flatnonzero(moved).astype(np.int32)
        change = weight[index] - old_weight[index]
        left, right, scale = _factorised(change, step)
        shipped = old_weight[index] + _product(left, right) * scale[:, None]
        return cls(
            q,
            q_scale,
            (bias[known:] + step.at_middle(lost)).astype(np.float32),
            index,
            left,
            right,
            scale,
            (bias[index] + step.at_middle(weight[index] - shipped)).astype(np.float32),
            confidence
            if confidence is not None
            else Confidence.none(len(weight) - len(set(retired))),
        )

    @property
    def new_weight(self) -> np.ndarray:
        """The rows of the new classes, float32 (n, features)."""
        return decode(self.new, self.new_scale)

    @property
    def step(self) -> np.ndarray:
        """The change of the rows in `index`, float32 (m, features)."""
        found: np.ndarray = _product(self.left, self.right) * self.scale[:, None]
        return found

    def applied(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the head after the task: float32 (C + n, features) and (C + n,)."""
        weight = np.concatenate([weight.astype(np.float32), self.new_weight])
        bias = np.concatenate([bias.astype(np.float32), self.new_bias])
        # Two float32 roundings, in this order on every machine: the state digest does not cover
        # the result, so only equal arithmetic keeps host and device equal.
        weight[self.index] += self.step
        bias[self.index] = self.bias
        return weight, bias

    @property
    def known_bytes(self) -> int:
        """Bytes that the changes of known rows take."""
        parts = self.index, self.left, self.right, self.scale, self.bias
        return sum(array.nbytes for array in parts)

    def tensors(self) -> dict[str, np.ndarray]:
        """Name the tensors as a packet and a run store them."""
        own = [getattr(self, name) for name in _FIELDS]
        return dict(zip(ROWS, own, strict=True)) | self.confidence.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> HeadUpdate:
        """Read what `tensors` has named. Raises KeyError if one is missing."""
        own = {field: tensors[name] for field, name in zip(_FIELDS, ROWS, strict=True)}
        return cls(**own, confidence=Confidence.from_tensors(tensors))


HEAD_PREFIX = "head."
"""Begins the name of every tensor of a `HeadUpdate`, and of no projection."""
_FIELDS = ("new", "new_scale", "new_bias", "index", "left", "right", "scale", "bias")
ROWS = (
    "head.new.weight",
    "head.new.scale",
    "head.new.bias",
    "head.old.index",
    "head.old.left",
    "head.old.right",
    "head.old.scale",
    "head.old.bias",
)
"""names of the tensors of rows, in the order of `HeadUpdate`"""
HEAD = (*ROWS, *CONFIDENCE)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 (m, features), exact: every sum of at most 1,024 products stays within 2^24."""
    found: np.ndarray = left.astype(np.float32) @ right.astype(np.float32)
    return found


def _rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest int8 rows (n, k) and their scales, float32 (n,)."""
    largest = LARGEST["int8"]
    scale = (np.abs(rows).max(axis=1, initial=0.0) / largest).astype(np.float32)
    return nearest(rows, scale[:, None], largest), scale


def _moved(
    old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray], step: Step
) -> np.ndarray:
    """Which known rows change by more than rounding: bool (C,)."""
    (old_weight, old_bias), (weight, bias) = old, new
    moved: np.ndarray = (weight != old_weight).any(axis=1)
    rows = np.flatnonzero(moved)
    moved[rows] = (decode(*_rounded(weight[rows])) != old_weight[rows]).any(axis=1)
    # The bias of such a row made up for its rounding, at another mean feature.
    middle = np.zeros(weight.shape[1]) if step.middle is None else np.abs(step.middle)
    allowed = 2 * np.abs(weight - old_weight) @ middle
    moved |= np.abs(bias.astype(np.float64) - old_bias) > allowed
    return moved


def _factorised(change: np.ndarray, step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers left (m, r) and right (r, features), and scale (m,), of a change (m, features).

    An image's logits change by `change (f - middle)`. With C the covariance, their products over
    all images are G = change C change'. The best approximation of rank r in their mean square is
    U U' change, U the first r eigenvectors of G (Eckart and Young). Each row of right ends at 127.
    The best left for the rounded right has one scale for each row, so that a row that changes
    little is not rounded to the step of one that changes much.
    """
    values, U = np.linalg.eigh(step.seen(change) @ change.T)
    kept = step.kept(values[::-1], len(change))
    right, _ = _rounded(U[:, ::-1][:, :kept].T @ change)
    wide = right.astype(np.float64)
    within = np.linalg.pinv(step.seen(wide) @ wide.T, hermitian=True)
    left, scale = _rounded(step.seen(change) @ wide.T @ within)
    return left, right, scale

"""The metrics of continual learning, from the accuracy matrix R[i][j]: task j after training task
i."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..results import Result

GENUINE = ("live", "real", "genuine", "bonafide")
"""class names that mean the positive side of a binary decision"""
Confusion = tuple[str, str, int]
"""(true class, predicted class, images)"""
FEW = 10
"""a class with fewer images is named: with nine, one answer is 11 points of its recall"""


@dataclass(frozen=True)
class Summary(Result):
    """The metrics of a run. Fractions are in [0, 1].

    Forgetting and backward transfer are differences of fractions, and 0 with one task.

    accuracy             A_i, over all images of the tasks 0..i, after each task i
    last                 A_{T-1}
    average_anytime      mean over i of A_i
    forgetting           mean over j < T-1 of ( max_{j <= i < T-1} R[i][j] - R[T-1][j] )
    backward_transfer    mean over j < T-1 of ( R[T-1][j] - R[j][j] )
    """

    accuracy: tuple[float, ...]
    last: float
    average_anytime: float
    forgetting: float
    backward_transfer: float


@dataclass(frozen=True)
class Hter(Result):
    """Half total error rate of a binary decision that accepts a score >= threshold.

    Lower is better. far: impostors accepted / impostors. frr: genuine images refused / genuine
    images. hter: (far + frr) / 2. All are fractions in [0, 1].
    """

    genuine: str
    hter: float
    far: float
    frr: float
    threshold: float


def summary(correct: Sequence[Sequence[int]], totals: Sequence[Sequence[int]]) -> Summary:
    """Summarise the accuracy matrix.

    Args:
        correct: correct[i][j], j <= i: test images of task j that are answered correctly after task
            i, out of all classes known then.
        totals: totals[i][j]: how many test images of task j there were after task i. A task has
            fewer if its classes retire, and none if it brought no images; then it counts in no
            mean.

    Raises:
        ValueError: There are no test images at all after a task.
    """
    count = len(correct)
    R, sizes = np.full((count, count), np.nan), np.zeros((count, count))
    for i, (row, total) in enumerate(zip(correct, totals, strict=True)):
        sizes[i, : i + 1], scored = total[: i + 1], np.array(total[: i + 1]) > 0
        if not scored.any():
            raise ValueError(f"no test images are left after task {i}: it cannot be scored")
        R[i, : i + 1][scored] = np.array(row[: i + 1])[scored] / sizes[i, : i + 1][scored]
    seen = [
        float(np.nansum(R[i, : i + 1] * sizes[i, : i + 1]) / sizes[i, : i + 1].sum())
        for i in range(count)
    ]
    # A task whose classes are all retired by now has nothing that could be forgotten.
    old = [j for j in range(count - 1) if sizes[-1, j] and sizes[j, j]]
    forgetting = [np.nanmax(R[j:-1, j]) - R[-1, j] for j in old]
    transfer = [R[-1, j] - R[j, j] for j in old]
    return Summary(
        accuracy=tuple(seen),
        last=seen[-1],
        average_anytime=float(np.mean(seen)),
        forgetting=float(np.mean(forgetting)) if old else 0.0,
        backward_transfer=float(np.mean(transfer)) if old else 0.0,
    )


def per_class(
    truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str | None]
) -> dict[str, tuple[int, int]]:
    """{class: (correct, images)} of the classes that have images.

    truth, predicted: int (N,), rows of the head. classes: of each row; None if it is retired.
    """
    return {
        name: (int((predicted[truth == c] == c).sum()), n)
        for c, name in enumerate(classes)
        if name is not None and (n := int((truth == c).sum()))
    }


def recall(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """{class: share of its images that is answered with it}, the lowest first.

    counts: what `per_class` has found.
    """
    found = {name: right / images for name, (right, images) in counts.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def few(counts: Mapping[str, int]) -> dict[str, int]:
    """Those of {class: images} with fewer than FEW images, the fewest first."""
    return {name: n for name, n in sorted(counts.items(), key=lambda item: item[1]) if n < FEW}


def confusions(
    truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str | None], most: int = 50
) -> tuple[Confusion, ...]:
    """The wrong answers by true and predicted class, the most frequent first.

    Arguments as in `per_class`.
    """
    wrong = Counter((int(t), int(p)) for t, p in zip(truth, predicted, strict=True) if t != p)
    frequent = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:most]
    return tuple((str(classes[t]), str(classes[p]), n) for (t, p), n in frequent)


def hter(scores: np.ndarray, genuine: np.ndarray, threshold: float, name: str = "") -> Hter:
    """Compute the half total error rate.

    Args:
        scores: float (N,); higher is more genuine.
        genuine: bool (N,).
        threshold: A score at or above it is accepted.
        name: The genuine class.

    Raises:
        ValueError: There are no impostors, or no genuine images.
    """
    scores, genuine = np.asarray(scores, np.float64), np.asarray(genuine, bool)
    if genuine.all() or not genuine.any():
        raise ValueError("HTER needs both genuine images and impostors")
    accepted = scores >= threshold
    far, frr = float(accepted[~genuine].mean()), float((~accepted[genuine]).mean())
    return Hter(name, (far + frr) / 2, far, frr, float(threshold))


def binary(scores: np.ndarray, truth: np.ndarray, classes: Sequence[str | None]) -> Hter | None:
    """HTER at the threshold that equals argmax: 0, on the genuine class's logit minus the other's.

    The genuine class is the one named live, real, genuine or bonafide, else the first. None unless
    two classes are known and both have images.

    Args:
        scores: float (N, rows).
        truth: int (N,), rows.
        classes: Of each row; None if it is retired.
    """
    live = [row for row, name in enumerate(classes) if name is not None]
    if len(live) != 2:
        return None
    positive = next((row for row in live if str(classes[row]).lower() in GENUINE), live[0])
    (other,) = set(live) - {positive}
    genuine = truth == positive
    if genuine.all() or not genuine.any():
        return None
    return hter(scores[:, positive] - scores[:, other], genuine, 0.0, str(classes[positive]))

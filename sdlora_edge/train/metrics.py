"""The metrics of continual learning, from the accuracy matrix R[i][j]: task j after training task i."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

GENUINE = ("live", "real", "genuine", "bonafide")
"""class names that mean the positive side of a binary decision"""


def summary(
    correct: Sequence[Sequence[int]], totals: Sequence[int]
) -> dict[str, float | list[float]]:
    """correct[i][j], j <= i: test images of task j answered rightly after task i, out of all classes seen; totals[j]: how
    many there are. Returns, as fractions in [0, 1] (forgetting and backward transfer as differences of them):

    accuracy             A_i, over all images of the tasks 0..i, after each task i
    last                 A_{T-1}
    average_anytime      mean over i of A_i
    forgetting           mean over j < T-1 of ( max_{j <= i < T-1} R[i][j] - R[T-1][j] ); 0 with one task
    backward_transfer    mean over j < T-1 of ( R[T-1][j] - R[j][j] ); 0 with one task
    """
    count = len(correct)
    sizes = np.array(totals[:count], np.float64)
    if (sizes <= 0).any():
        raise ValueError("a task without test images cannot be scored")
    R = np.full((count, count), np.nan)
    for i, row in enumerate(correct):
        R[i, : i + 1] = np.array(row[: i + 1]) / sizes[: i + 1]
    seen = [
        float((R[i, : i + 1] * sizes[: i + 1]).sum() / sizes[: i + 1].sum()) for i in range(count)
    ]
    old = range(count - 1)
    forgetting = [R[j:-1, j].max() - R[-1, j] for j in old]
    transfer = [R[-1, j] - R[j, j] for j in old]
    return {
        "accuracy": seen,
        "last": seen[-1],
        "average_anytime": float(np.mean(seen)),
        "forgetting": float(np.mean(forgetting)) if count > 1 else 0.0,
        "backward_transfer": float(np.mean(transfer)) if count > 1 else 0.0,
    }


def per_class(
    truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str | None]
) -> dict[str, list[int]]:
    """{class: [right, total]} of the classes that have images. truth, predicted: int (N,), indices into `classes`."""
    return {
        name: [int((predicted[truth == c] == c).sum()), n]
        for c, name in enumerate(classes)
        if name is not None and (n := int((truth == c).sum()))
    }


def confusions(
    truth: np.ndarray, predicted: np.ndarray, classes: Sequence[str | None], most: int = 50
) -> list[list[Any]]:
    """[truth, predicted, count] of the wrong answers, the most frequent first."""
    wrong = Counter((int(t), int(p)) for t, p in zip(truth, predicted, strict=True) if t != p)
    return [
        [classes[t], classes[p], n]
        for (t, p), n in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:most]
    ]


def hter(scores: np.ndarray, genuine: np.ndarray, threshold: float) -> dict[str, float]:
    """Half total error rate of a binary decision that accepts a score >= threshold; lower is better.

    scores: float (N,), higher is more genuine. genuine: bool (N,). Returns, as fractions in [0, 1]:

    far     impostors accepted / impostors
    frr     genuine ones refused / genuine ones
    hter    (far + frr) / 2

    and the threshold. Raises ValueError where there is no impostor or no genuine one.
    """
    scores, genuine = np.asarray(scores, np.float64), np.asarray(genuine, bool)
    if genuine.all() or not genuine.any():
        raise ValueError("HTER needs both genuine ones and impostors")
    accepted = scores >= threshold
    far, frr = float(accepted[~genuine].mean()), float((~accepted[genuine]).mean())
    return {"hter": (far + frr) / 2, "far": far, "frr": frr, "threshold": float(threshold)}


def binary(
    scores: np.ndarray, truth: np.ndarray, classes: Sequence[str | None]
) -> dict[str, Any] | None:
    """HTER at the threshold that equals argmax: 0, on the genuine class's logit minus the other's. None with one side only.

    The genuine class is the one named live, real, genuine or bonafide, if any, else the first. scores: (N, 2).
    """
    positive = next((i for i, name in enumerate(classes) if name and name.lower() in GENUINE), 0)
    genuine = truth == positive
    if genuine.all() or not genuine.any():
        return None
    return {
        "genuine": classes[positive],
        **hter(scores[:, positive] - scores[:, 1 - positive], genuine, 0.0),
    }

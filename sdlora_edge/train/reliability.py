"""How far a model's answers can be relied on: calibration, and known images against unknown ones.

    ECE      sum over bins m of |B_m| / n * | acc(B_m) - conf(B_m) |        (Guo et al., ICML 2017,
             arXiv 1706.04599, eq. 3: M equal-width bins of the highest probability)
    AUROC    P(s_known > s_unknown) + P(s_known = s_unknown) / 2             (Hanley & McNeil,
             Radiology 143, 1982: the rank statistic of Mann and Whitney)

A score says how well known an image is; an image is accepted if its score >= threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.confidence import Confidence
from ..results import Result

BINS = 15
SHARES = (0.99, 0.95, 0.9, 0.8)
"""shares of known images that are accepted, for which `thresholds` finds a threshold"""


@dataclass(frozen=True)
class Bin(Result):
    """The images whose highest probability lies in (m / M, (m + 1) / M], for bin m of M.

    Attributes:
        count: Number of images.
        confidence: Mean of their highest probabilities; 0 without images.
        accuracy: Share of them that is answered correctly; 0 without images.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration(Result):
    """Whether answers that are given with 80 % are right in 80 of 100 cases.

    Attributes:
        ece: Expected calibration error, a fraction in [0, 1]; lower is better.
        temperature: That of the probabilities.
        bins: BINS of them, from the lowest probability to the highest: a reliability diagram.
    """

    ece: float
    temperature: float
    bins: tuple[Bin, ...]

    @property
    def confidence(self) -> float:
        """Mean of the highest probabilities over all images."""
        return self._mean([one.confidence for one in self.bins])

    @property
    def accuracy(self) -> float:
        """Share of all images that is answered correctly."""
        return self._mean([one.accuracy for one in self.bins])

    def _mean(self, values: Sequence[float]) -> float:
        return float(np.average(values, weights=[one.count for one in self.bins]))


@dataclass(frozen=True)
class Acceptance(Result):
    """How many images of known classes a threshold accepts.

    Attributes:
        accepted: Share of the images of known classes; 1 without a threshold.
        threshold: None if every image counts as known.
    """

    accepted: float
    threshold: float | None


@dataclass(frozen=True)
class Threshold(Result):
    """A threshold, and the share of known and of unknown images that it accepts."""

    threshold: float
    accepted: float
    false_accept: float


@dataclass(frozen=True)
class Rejection(Acceptance):
    """How well unknown images are told from known ones. Shares are in [0, 1].

    Attributes:
        data: Where the unknown images are.
        images: How many of them could be read.
        left_out: Class folders of `data` that are not unknown: their names are known classes.
        auroc: Chance that a known image has a higher score than an unknown one; 1 is best, 0.5 is
            guessing.
        false_accept: Share of the unknown images that is accepted; 1 without a threshold.
        thresholds: Other thresholds to choose from.
    """

    data: str
    images: int
    left_out: tuple[str, ...]
    auroc: float
    false_accept: float
    thresholds: tuple[Threshold, ...]


def calibrated(confidence: Confidence, logits: np.ndarray, correct: np.ndarray) -> Calibration:
    """Compute `calibration` of a state's probabilities.

    Args:
        confidence: The state's.
        logits: float (N, live rows).
        correct: bool (N,), whether the highest logit is that of the true class.

    Raises:
        ValueError: There are no images.
    """
    highest = confidence.probabilities(logits).max(axis=1)
    return calibration(highest, correct, float(confidence.temperature[0]))


def acceptance(confidence: Confidence, scores: np.ndarray) -> Acceptance:
    """How many images of known classes a state accepts. scores: float (N,), N > 0, of them."""
    threshold = float(confidence.threshold[0]) if confidence.tells_unknown else None
    return Acceptance(accepted(scores, threshold), threshold)


def calibration(
    confidence: np.ndarray, correct: np.ndarray, temperature: float = 1.0
) -> Calibration:
    """Compare probabilities with the share of correct answers (ECE, see above).

    Args:
        confidence: float (N,), the highest probability of each image.
        correct: bool (N,), whether the class of that probability is the true one.
        temperature: That of the probabilities.

    Raises:
        ValueError: There are no images.
    """
    if not len(confidence):
        raise ValueError("calibration needs images")
    edges = np.arange(1, BINS) / BINS
    place = np.searchsorted(edges, confidence, side="left")
    bins = []
    for m in range(BINS):
        own = place == m
        means = [float(np.mean(v[own])) if own.any() else 0.0 for v in (confidence, correct)]
        bins.append(Bin(int(own.sum()), *means))
    gaps = sum(one.count * abs(one.accuracy - one.confidence) for one in bins)
    return Calibration(gaps / len(confidence), temperature, tuple(bins))


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Compute the area under the ROC curve by ranks; ties count half.

    Args:
        known: float (N,), scores of images of known classes.
        unknown: float (M,), scores of images of unknown classes.

    Raises:
        ValueError: One of the two is empty.
    """
    if not len(known) or not len(unknown):
        raise ValueError("AUROC needs both known and unknown images")
    ordered = np.sort(unknown)
    below, at_most = (np.searchsorted(ordered, known, side=side) for side in ("left", "right"))
    return float((below.mean() + at_most.mean()) / (2 * len(ordered)))


def accepted(scores: np.ndarray, threshold: float | None) -> float:
    """The share of images with a score >= threshold; 1 if it is None.

    Of known images it is the acceptance rate, of unknown ones the false-accept rate.

    Raises:
        ValueError: There are no images.
    """
    if not len(scores):
        raise ValueError("a share of accepted images needs images")
    return 1.0 if threshold is None else float((scores >= threshold).mean())


def thresholds(known: np.ndarray, unknown: np.ndarray) -> tuple[Threshold, ...]:
    """Find, for each of SHARES, the highest threshold that accepts at least this share of `known`.

    Arguments as in `auroc`.
    """
    best_first = np.sort(known)[::-1]
    ranks = [math.ceil(share * len(best_first) - 1e-9) - 1 for share in SHARES]
    levels = [float(best_first[rank]) for rank in ranks]
    return tuple(Threshold(t, accepted(known, t), accepted(unknown, t)) for t in levels)

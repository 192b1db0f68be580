"""How far the answers of a state can be believed: its temperature and its unknown score.

Both are measured on held-out images: images of a new task that its direction was not trained on.
They are in the class means, so each is judged by a head without it. Leaving one of n images out
moves its own class mean only:

    own logit  <-  own logit - a / 2 * (f - mu)' S^-1 (f - mu) * ( (n / (n - 1))^2 - 1 )
    a          the factor between the head's logits and the discriminant's own

Nobody has the images of earlier tasks. So each task leaves two numbers, its temperature and its
threshold, and a state uses their means, weighted by the numbers of images. (Samples of the class
Gaussians do not serve: they are far easier than images.)

The score is that of `formats.confidence`. With the head's rows W = a M S^-1, M the offsets of the C
class means, and G = M S^-1 M' = W S W' / a^2 with eigenvalues g_j and eigenvectors e_j:

    (f - m)' ( S^-1 - (S + M'M / C)^-1 ) (f - m)  =  sum_j ( e_j' W (f - m) / a )^2 / (C + g_j)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.confidence import Confidence
from ..formats.encoding import LARGEST, nearest
from ..formats.limits import LIMITS
from .head import FeatureStatistics
from .sdlora import Head

ACCEPTED = 0.95
"""share of the held-out images that count as known"""
AWAY = 15.0
"""Weight of the mean squared distance of the features, in standard deviations, from the mean of all
classes. From 8 to 40 every black and noise image was rejected; images of later classes are told
apart worse from 40 on."""
TEMPERATURES = np.exp(np.linspace(np.log(0.02), np.log(50), 400))
"""that are tried; neighbours differ by 2 %"""
FEW = 5
"""held-out images of a task that are too few to measure anything"""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured on the held-out images of each task.

    Attributes:
        images: int64 (tasks,), how many there were.
        temperatures: float64 (tasks,).
        thresholds: float64 (tasks,), in units of the squared Mahalanobis distance / 2.
    """

    images: np.ndarray
    temperatures: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def empty(cls) -> Calibration:
        """That of no task."""
        return cls(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    def after(self, images: int, temperature: float, threshold: float) -> Calibration:
        """With one more task."""
        return Calibration(
            np.append(self.images, images),
            np.append(self.temperatures, temperature),
            np.append(self.thresholds, threshold),
        )

    @property
    def temperature(self) -> float:
        """The geometric mean over all images; 1 without any."""
        if not self.images.sum():
            return 1.0
        return float(np.exp(np.average(np.log(self.temperatures), weights=self.images)))

    @property
    def threshold(self) -> float:
        """The mean over all images. Raises ZeroDivisionError without any."""
        return float(np.average(self.thresholds, weights=self.images))


@dataclass(frozen=True, eq=False)
class Judge:
    """A head with the statistics that it was fitted to.

    Args:
        statistics: Of the features of all classes.
        head: As a device has it.
        live: Rows that may be answered.
    """

    statistics: FeatureStatistics
    head: Head
    live: Sequence[int]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features (n, d) to logits, float64 (n, live rows)."""
        weight, bias = (array[list(self.live)].astype(np.float64) for array in self.head)
        found: np.ndarray = features.astype(np.float64) @ weight.T + bias
        return found

    @property
    def factor(self) -> float:
        """a, between the head's logits and the discriminant's own.

        From W = a M S^-1: tr(W S W') = a^2 tr(M S^-1 M') and tr(W M') = a tr(M S^-1 M'), each
        about its mean over classes.
        """
        rows = list(self.live)
        W, M = self.head[0][rows].astype(np.float64), self.statistics.means[rows]
        W, M = W - W.mean(axis=0), M - M.mean(axis=0)
        squares, products = ((W @ self.statistics.covariance()) * W).sum(), (W * M).sum()
        return float(squares / products) if products > 0 and squares > 0 else 1.0

    def left_out(self, features: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The logits of images that are in the statistics, each by a head without it.

        Args:
            features: (n, d).
            targets: Rows, int (n,), of classes of two images at least.
        """
        logits = self.logits(features)
        away = features.astype(np.float64) - self.statistics.means[targets]
        squares = (away * np.linalg.solve(self.statistics.covariance(), away.T).T).sum(axis=1)
        count = self.statistics.counts[targets]
        columns = np.searchsorted(list(self.live), targets)
        more = (count / (count - 1)) ** 2 - 1
        logits[np.arange(len(targets)), columns] -= 0.5 * self.factor * squares * more
        return logits

    def confidence(self, calibration: Calibration) -> Confidence:
        """What a state with this head knows of its own answers."""
        if len(self.live) < 2 or not calibration.images.sum():
            return Confidence.none(len(self.live))
        score = self._score(calibration.temperature)
        threshold = np.array([self.factor * calibration.threshold], np.float32)
        return Confidence(**{**score.__dict__, "threshold": threshold})

    def measured(
        self, calibration: Calibration, features: np.ndarray, targets: np.ndarray
    ) -> Calibration:
        """Measure temperature and threshold on held-out images, which are in the statistics.

        Args:
            calibration: Of the tasks before.
            features: (n, d).
            targets: Rows, int (n,).
        """
        usable = self.statistics.counts[targets] > 1
        features, targets = features[usable], targets[usable]
        if len(self.live) < 2 or len(targets) < FEW:
            return calibration
        logits = self.left_out(features, targets)
        temperature = best_temperature(logits, np.searchsorted(list(self.live), targets))
        scores = self._score(1.0).scores(logits, features) / self.factor
        threshold = float(np.quantile(scores, 1 - ACCEPTED))
        return calibration.after(len(targets), temperature, threshold)

    def _score(self, temperature: float) -> Confidence:
        """The unknown score, without a threshold."""
        rows, a = list(self.live), self.factor
        weight, bias = (array[rows].astype(np.float64) for array in self.head)
        squares = weight @ self.statistics.covariance() @ weight.T / a**2
        g, E = np.linalg.eigh(squares)
        kept = np.argsort(-g)[: min(len(rows) - 1, LIMITS.components)]
        forms = (E[:, kept] / np.sqrt(2 * a * (len(rows) + np.maximum(g[kept], 0)))).T
        largest = LARGEST["int8"]
        scale = (np.abs(forms).max(axis=1) / largest).astype(np.float32)
        q = nearest(forms, scale[:, None], largest)
        middle, spread = self.statistics.means[rows].mean(axis=0), self.statistics.spread(rows)
        # Taken after rounding, so that the mean of all classes has exactly 0 here.
        offset = -(q * scale[:, None].astype(np.float64)) @ (weight @ middle + bias)
        return Confidence(
            temperature=np.array([temperature], np.float32),
            weight=q,
            scale=scale,
            bias=offset.astype(np.float32),
            mean=middle.astype(np.float16),
            precision=(np.sqrt(a * AWAY / len(middle)) / spread).astype(np.float16),
            threshold=np.zeros(0, np.float32),
        )


def best_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature of the smallest cross-entropy (Guo et al., 2017).

    logits: (n, classes). targets: columns, int (n,).
    """
    own = logits[np.arange(len(targets)), targets]
    top = logits.max(axis=1)
    losses = [
        np.mean(np.log(np.exp((logits - top[:, None]) / T).sum(axis=1)) - (own - top) / T)
        for T in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(losses))])

"""How far the answers of a state can be believed: its temperature and its unknown score.

Both are measured on held-out images: images of a new task that its direction was not trained on.
They are judged by a head that is fitted without them. (With more features than images, an image
that has its share in the covariance looks far too near: measured that way, a fifth of the images of
known classes was rejected, instead of a twentieth.)

Nobody has the images of earlier tasks. So of each held-out image stays what the cross-entropy would
be at each temperature, summed over images, and its score. (A mean of the tasks' temperatures does
not serve: that of a task without a mistake is near 0. Samples of the class Gaussians do not serve
either: they are far easier than images.)

The score is that of `formats.confidence`. With the head's rows W = a M S^-1, M the offsets of the C
class means, and G = M S^-1 M' = W S W' / a^2 with eigenvalues g_j and eigenvectors e_j:

    (f - m)' ( S^-1 - (S + M'M / C)^-1 ) (f - m)  =  sum_j ( e_j' W (f - m) / a )^2 / (C + g_j)

The distance from m in all features that the score adds weighs each feature by how far images that
show nothing lie away in it. With v the variance of the features, and z the features of blank images
(`Preparation.blank`) under the same weights:

    sum_f u_f (f - m)_f^2 / v_f,   u = mean over z of  r_z / mean_f r_zf,   r_zf = (z - m)_f^2 / v_f
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..formats.confidence import Confidence
from ..formats.encoding import LARGEST, nearest
from ..formats.limits import LIMITS
from .head import FeatureStatistics
from .sdlora import Head

ACCEPTED = 0.95
"""share of the held-out images that count as known"""
AWAY = 16.0
"""Weight of the mean squared distance of the features, in standard deviations, from the mean of all
classes. With a larger one images of another dataset are told apart better, and those of later
classes worse (docs/method.md)."""
TEMPERATURES = np.exp(np.linspace(np.log(0.02), np.log(50), 200))
"""that are tried; neighbours differ by 4 %"""
FEW = 20
"""held-out images, of all tasks together, that are too few to say anything"""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured on the held-out images of all tasks.

    Attributes:
        losses: float64, for each of TEMPERATURES the cross-entropy, summed over images.
        scores: float64 (n,), of each image, in units of the squared Mahalanobis distance / 2; 0 if
            the head has no statistics.
    """

    losses: np.ndarray
    scores: np.ndarray

    @classmethod
    def empty(cls) -> Calibration:
        """That of no image."""
        return cls(np.zeros(len(TEMPERATURES)), np.zeros(0))

    @property
    def says_something(self) -> bool:
        """Whether there were enough images."""
        return len(self.scores) >= FEW

    @property
    def temperature(self) -> float:
        """That of the smallest cross-entropy over all images (Guo et al., 2017)."""
        return float(TEMPERATURES[int(np.argmin(self.losses))])

    @property
    def threshold(self) -> float:
        """The score that ACCEPTED of all images reach."""
        return float(np.quantile(self.scores, 1 - ACCEPTED))


@dataclass(frozen=True, eq=False)
class Judge:
    """A head with the statistics that it was fitted to.

    Args:
        statistics: Of the features of all classes; None for a head that was trained. Then nothing
            can be unknown.
        head: As a device has it.
        live: Rows that may be answered.
        blank: float (n, d), features of images that show nothing; if there are none, all features
            weigh alike.
    """

    statistics: FeatureStatistics | None
    head: Head
    live: Sequence[int]
    blank: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features (n, d) to logits, float64 (n, live rows)."""
        weight, bias = (array[list(self.live)].astype(np.float64) for array in self.head)
        found: np.ndarray = features.astype(np.float64) @ weight.T + bias
        return found

    def confidence(self, calibration: Calibration) -> Confidence:
        """What a state with this head knows of its own answers."""
        if len(self.live) < 2 or not calibration.says_something:
            return Confidence.none(len(self.live))
        temperature = np.array([calibration.temperature], np.float32)
        if self.statistics is None:
            return replace(Confidence.none(len(self.live)), temperature=temperature)
        score, factor = self._unknown_score(self.statistics)
        threshold = np.array([factor * calibration.threshold], np.float32)
        return replace(score, temperature=temperature, threshold=threshold)

    def measured(
        self, calibration: Calibration, features: np.ndarray, targets: np.ndarray
    ) -> Calibration:
        """Measure temperature and threshold on images that neither head nor statistics have seen.

        Args:
            calibration: Of the tasks before.
            features: (n, d).
            targets: Rows, int (n,).
        """
        if len(self.live) < 2 or not len(targets):
            return calibration
        logits, scores = self.logits(features), np.zeros(len(targets))
        if self.statistics is not None:
            score, factor = self._unknown_score(self.statistics)
            scores = score.scores(logits, features) / factor
        columns = np.searchsorted(list(self.live), targets)
        return Calibration(
            calibration.losses + _losses(logits, columns),
            np.concatenate([calibration.scores, scores]),
        )

    def _unknown_score(self, statistics: FeatureStatistics) -> tuple[Confidence, float]:
        """(the unknown score, with a temperature of 1 and no threshold; a)."""
        rows, a = list(self.live), _factor(statistics, self.head, self.live)
        weight, bias = (array[rows].astype(np.float64) for array in self.head)
        g, E = np.linalg.eigh(weight @ statistics.covariance() @ weight.T / a**2)
        kept = np.argsort(-g)[: min(len(rows) - 1, LIMITS.components)]
        forms = (E[:, kept] / np.sqrt(2 * a * (len(rows) + np.maximum(g[kept], 0)))).T
        scale = (np.abs(forms).max(axis=1) / LARGEST["int8"]).astype(np.float32)
        q = nearest(forms, scale[:, None], LARGEST["int8"])
        middle, spread = statistics.means[rows].mean(axis=0), statistics.spread(rows)
        # Taken after rounding, so that the mean of all classes has exactly 0 here.
        offset = -(q * scale[:, None].astype(np.float64)) @ (weight @ middle + bias)
        share = _shares(self.blank, middle, spread)
        score = replace(
            Confidence.none(len(rows)),
            weight=q,
            scale=scale,
            bias=offset.astype(np.float32),
            mean=middle.astype(np.float16),
            precision=(np.sqrt(a * AWAY * share) / spread).astype(np.float16),
        )
        return score, a


def _factor(statistics: FeatureStatistics, head: Head, live: Sequence[int]) -> float:
    """a, between the head's logits and the discriminant's own.

    From W = a M S^-1: tr(W S W') = a^2 tr(M S^-1 M') and tr(W M') = a tr(M S^-1 M'), each about
    its mean over classes.
    """
    W, M = head[0][list(live)].astype(np.float64), statistics.means[list(live)]
    W, M = W - W.mean(axis=0), M - M.mean(axis=0)
    squares, products = ((W @ statistics.covariance()) * W).sum(), (W * M).sum()
    return float(squares / products) if products > 0 and squares > 0 else 1.0


def _shares(blank: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """u / d: the weights of the features (d,), whose sum is 1. blank: (n, d), or empty."""
    if not len(blank):
        return np.full(len(middle), 1 / len(middle))
    squares = ((blank - middle) / spread) ** 2
    found: np.ndarray = (squares / squares.sum(axis=1, keepdims=True)).mean(axis=0)
    return found


def _losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The cross-entropy at each of TEMPERATURES, summed over images: (temperatures,).

    logits: (n, classes). targets: columns, int (n,).
    """
    below = logits - logits.max(axis=1, keepdims=True)
    own = below[np.arange(len(targets)), targets]
    return np.array([(np.log(np.exp(below / T).sum(axis=1)) - own / T).sum() for T in TEMPERATURES])

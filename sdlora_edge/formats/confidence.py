"""From logits and features to what they are worth: a probability, and whether the class is known.

    probability   p = softmax(logits / T) over live rows; T is the temperature (Guo et al., ICML
                  2017, arXiv 1706.04599)
    score         s = max_c logit_c - sum_j ( scale_j sum_c q_jc logit_c + bias_j )^2
                                    - sum_f ( precision_f (feature_f - mean_f) )^2
    known         s >= threshold

The first line of the score is the relative Mahalanobis distance (Ren et al., 2021, arXiv
2106.09022) with its sign turned, up to a constant. The head is a discriminant with one covariance S
for all classes, so max_c logit_c is minus half the distance to the nearest class, plus a quadratic
form in the features. The same holds for the distance under one Gaussian for all classes, whose
covariance is S + M'M / C with the class means' offsets M. By Woodbury's identity the two forms
differ in the row space of the head alone. So their difference is a quadratic form in the logits,
and no matrix of the features' size travels (`method.head`).

An image may also lie far away in directions that no class differs in, such as a black one. The
second line finds it: the distance to the mean of all classes, under the variance of each feature.

numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TEMPERATURE = "head.temperature"
WEIGHT, SCALE = "head.unknown.weight", "head.unknown.scale"
BIAS, THRESHOLD = "head.unknown.bias", "head.unknown.threshold"
MEAN, PRECISION = "head.unknown.mean", "head.unknown.precision"
CONFIDENCE = (TEMPERATURE, WEIGHT, SCALE, BIAS, MEAN, PRECISION, THRESHOLD)
"""names of the tensors, in the order of `Confidence`"""


@dataclass(frozen=True, eq=False)
class Confidence:
    """What a state knows of its own answers. Each task replaces the whole.

    Attributes:
        temperature: float32 (1,), T > 0.
        weight: int8 (k, live rows), q.
        scale: float32 (k,).
        bias: float32 (k,).
        mean: float16 (features,); or (0,) if the score needs the logits alone.
        precision: float16, as many as `mean`. A weight divided by a standard deviation.
        threshold: float32 (1,); or (0,) if every image counts as known.
    """

    temperature: np.ndarray
    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    precision: np.ndarray
    threshold: np.ndarray

    @classmethod
    def none(cls, live: int) -> Confidence:
        """A temperature of 1, and every image counts as known. live: number of live rows."""
        empty, half = np.zeros(0, np.float32), np.zeros(0, np.float16)
        weight = np.zeros((0, live), np.int8)
        return cls(np.ones(1, np.float32), weight, empty, empty, half, half, empty)

    @property
    def tells_unknown(self) -> bool:
        """Whether an image can be unknown."""
        return bool(len(self.threshold))

    @property
    def least(self) -> float | None:
        """The threshold: the lowest score of a known image. None if every image is known."""
        return float(self.threshold[0]) if self.tells_unknown else None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, live rows) to probabilities, float64 (N, live rows)."""
        scaled = logits.astype(np.float64) / float(self.temperature[0])
        found: np.ndarray = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        return found

    def scores(self, logits: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        """Compute scores, float64 (N,). A higher one is better known.

        logits: (N, live rows). features: (N, features); needed unless `mean` is empty.
        """
        wide = logits.astype(np.float64)
        parts = (wide @ self.weight.T.astype(np.float64)) * self.scale + self.bias
        found: np.ndarray = wide.max(axis=1) - (parts**2).sum(axis=1)
        if not len(self.mean):
            return found
        if features is None:
            raise ValueError("this score needs features")
        away = (features.astype(np.float64) - self.mean) * self.precision
        found -= (away**2).sum(axis=1)
        return found

    def known(
        self,
        logits: np.ndarray,
        features: np.ndarray | None = None,
        threshold: float | None = None,
    ) -> np.ndarray:
        """Which images are of a known class: bool (N,). threshold: in place of the state's own."""
        least = self.least if threshold is None else threshold
        if least is None:
            return np.ones(len(logits), bool)
        found: np.ndarray = self.scores(logits, features) >= least
        return found

    def tensors(self) -> dict[str, np.ndarray]:
        """Name the tensors as a packet, a bundle and a run store them."""
        return dict(zip(CONFIDENCE, self.__dict__.values(), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Confidence:
        """Read what `tensors` has named. Raises KeyError if one is missing."""
        return cls(*(tensors[name] for name in CONFIDENCE))

"""The aligned head: a shared-covariance Gaussian discriminant over all classes, from feature
statistics instead of images.

The host keeps a mean for each class and one within-class scatter, never an image. As a new task
moves the backbone, features of old classes drift. Nobody has their images, but the new task's
images show the motion. It is fitted on their features f before the task and f' after it (m: mean of
f, c: mean of f' - f), and the old statistics follow it. Then every head row of a live class is
fitted again:

    motion        g(f) = f + c + (f - m) R + sum_i k(f, f_i) a_i
                  R = argmin ||(F - m) R - (F' - F - c)||^2 + ridge ||R||^2    moves all features
                  a = (K + noise I)^-1 (F' - F - c - (F - m) R)                moves those nearby
                  k(f, f_i) = exp( -||f - f_i||^2 / (2 width v) ),  v = mean ||f_i - m||^2
    means         mu <- g(mu);  scatter <- (I + R)' scatter (I + R)
    discriminant  w_c = S^-1 (mu_c - mu),  b_c = -(mu_c - mu)' S^-1 (mu_c + mu) / 2
                  mu = mean of the mu_c,  S = (1 - s) Sigma + s diag(Sigma)
                  Sigma = scatter / (n - C),  s: shrinkage

The features of several blocks have several spreads. The motion is fitted on features divided by
their standard deviations, and S shrinks towards its own diagonal. So nothing depends on the unit
in which a feature is measured.

A class that is learned alone moves no features, and its row alone is new. No answer changes if all
logits are multiplied by one number and shifted by one linear function of the features. So `beside`
brings the fitted rows as near as that allows to a head's old rows, which stay as they are. For the
same reason a task that only retires or renames classes fits nothing again: the rows that are left
already are the discriminant of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..state import UNUSED

SHRINKAGE = 0.5
RIDGE = 500
"""number of images of mean variance that it is as strong as"""
KERNEL_WIDTH, KERNEL_NOISE, KERNEL_POINTS = 0.5, 1.0, 2000
"""width and noise as above; the largest number of images that are points of the kernel"""
SCALE = 5.0
"""root mean square over classes of a class mean's own logit. It only sets how confident the softmax
is. If it were twice as large, float32's rounding would take logits 1e-4 away from torch's, which
export refuses"""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of the features of all classes so far.

    Row c of each array belongs to row c of the head, retired classes included.

    Attributes:
        means: float64 (C, d).
        scatter: float64 (d, d), summed over all images, each about its class mean.
        counts: int64 (C,), images of each class.
    """

    means: np.ndarray
    scatter: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, width: int) -> FeatureStatistics:
        """Those of no class. width: d."""
        return cls(np.zeros((0, width)), np.zeros((width, width)), np.zeros(0, np.int64))

    def drifted(self, before: np.ndarray, after: np.ndarray) -> FeatureStatistics:
        """Follow the backbone.

        before, after: features (n, d) of the same new images before and after the task.
        """
        if not len(self.means):
            return self
        before, after = before.astype(np.float64), after.astype(np.float64)
        middle, shift = before.mean(axis=0), (after - before).mean(axis=0)
        size = _positive(before.std(axis=0))
        X, Y = (before - middle) / size, (after - before - shift) / size
        gram = X.T @ X
        R = np.linalg.solve(
            gram + RIDGE / len(X) * np.trace(gram) / len(gram) * np.eye(len(gram)), X.T @ Y
        )
        old = (self.means - middle) / size
        points = slice(None, None, -(-len(X) // KERNEL_POINTS))
        near = _kernel_ridge(X[points], (Y - X @ R)[points], old)
        carry = np.eye(len(R)) + R * size / size[:, None]
        means = self.means + shift + (old @ R + near) * size
        return FeatureStatistics(means, carry.T @ self.scatter @ carry, self.counts)

    def with_images(
        self, features: np.ndarray, targets: np.ndarray, classes: int
    ) -> FeatureStatistics:
        """Add images of new or known classes. Several views of an image count as one image.

        Two groups of one class, n and m images, are pooled exactly (Chan et al., 1979): their
        scatters add up with n m / (n + m) times the outer product of their means' difference.

        Args:
            features: (n, d) or (views, n, d).
            targets: Rows, int (n,), in [0, classes).
            classes: Number of rows after that, at least C.
        """
        features = features.astype(np.float64)
        features = features[None] if features.ndim == 2 else features
        views, _, width = features.shape
        means, counts, scatter = (
            np.zeros((classes, width)),
            np.zeros(classes, np.int64),
            self.scatter.copy(),
        )
        means[: len(self.means)], counts[: len(self.means)] = self.means, self.counts
        for c in np.unique(targets):
            own = features[:, targets == c].reshape(-1, width)
            mean, n, m = own.mean(axis=0), len(own) // views, counts[c]
            gap = mean - means[c]
            scatter += (own - mean).T @ (own - mean) / views + n * m / (n + m) * np.outer(gap, gap)
            means[c] += gap * n / (n + m)
            counts[c] = n + m
        return FeatureStatistics(means, scatter, counts)

    def discriminant(
        self, live: Sequence[int] | None = None, shrinkage: float = SHRINKAGE
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fit the head that the statistics imply, with equal priors.

        live: rows that may be answered; None for all. The other rows get weight 0 and bias UNUSED.
        Returns (weight float32 (C, d), bias float32 (C,)).
        """
        rows = np.arange(len(self.means)) if live is None else np.array(live, np.int64)
        weight, bias = (
            np.zeros(shape, np.float32) for shape in (self.means.shape, len(self.means))
        )
        bias[:] = UNUSED
        if len(rows):
            weight[rows], bias[rows] = self._fitted(self.means[rows], shrinkage)
        return weight, bias

    def covariance(self, shrinkage: float = SHRINKAGE) -> np.ndarray:
        """S, the shrunk covariance of the features within a class: float64 (d, d)."""
        found = self.scatter / max(1, int(self.counts.sum()) - len(self.means))
        variances = _positive(np.diag(found))
        found = (1 - shrinkage) * found
        found[np.diag_indices_from(found)] = variances
        return found

    def around(self, live: Sequence[int]) -> np.ndarray:
        """The covariance of the features over all live classes about their mean: float64 (d, d)."""
        offsets = self.means[list(live)]
        offsets = offsets - offsets.mean(axis=0)
        found: np.ndarray = self.covariance() + offsets.T @ offsets / len(offsets)
        return found

    def spread(self, live: Sequence[int]) -> np.ndarray:
        """The standard deviation of each feature over all live classes: float64 (d,), positive."""
        within = self.scatter.diagonal() / max(1, int(self.counts.sum()) - len(self.means))
        return _positive(np.sqrt(within + self.means[list(live)].var(axis=0)))

    def _fitted(self, means: np.ndarray, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
        """The discriminant's rows for these class means, float64 (n, d)."""
        middle = means.mean(axis=0)
        weight = np.linalg.solve(self.covariance(shrinkage), (means - middle).T).T
        bias = -0.5 * (weight * (means + middle)).sum(axis=1)
        own = 0.5 * (weight * (means - middle)).sum(axis=1)
        scale = SCALE / max(1e-12, float(np.sqrt(np.mean(own**2))))
        return (weight * scale).astype(np.float32), (bias * scale).astype(np.float32)

    def beside(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        rows: np.ndarray,
        live: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fit some rows of a head again, and leave the others as they are.

        Args:
            weight: float32 (K, d), K <= C, the head so far.
            bias: float32 (K,).
            rows: int (n,), the rows to fit; those of new classes must be among them.
            live: Rows that may be answered; None for all.

        Returns:
            Weight float32 (C, d) and bias float32 (C,).
        """
        fitted_weight, fitted_bias = self.discriminant(live)
        known = np.arange(len(weight)) if live is None else np.array(live, np.int64)
        kept = np.setdiff1d(known[known < len(weight)], rows)
        if not len(kept):
            return fitted_weight, fitted_bias
        old, new = weight[kept].astype(np.float64), fitted_weight[kept].astype(np.float64)
        aside, centred = old.mean(axis=0), new - new.mean(axis=0)
        spread = float((centred**2).sum())
        # A single kept row says nothing of the scale.
        scale = float(((old - aside) * centred).sum()) / spread if spread else 1.0
        shift = aside - scale * new.mean(axis=0)
        lift = float((bias[kept] - scale * fitted_bias[kept]).mean())
        fitted_weight[rows] = (scale * fitted_weight[rows] + shift).astype(np.float32)
        fitted_bias[rows] = (scale * fitted_bias[rows] + lift).astype(np.float32)
        fitted_weight[kept], fitted_bias[kept] = weight[kept], bias[kept]
        return fitted_weight, fitted_bias


def _positive(values: np.ndarray) -> np.ndarray:
    """The same numbers; one that is 0, of a feature that never varies, becomes a small one."""
    least = 1e-6 * float(values.max(initial=0.0))
    found: np.ndarray = np.maximum(values, least if least > 0 else 1.0)
    return found


def _kernel_ridge(X: np.ndarray, Y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Predict at other places by a Gaussian kernel ridge regression.

    X, Y: (n, d), both centred; the regression is of Y on X. at: (m, d). Returns (m, d).
    """
    scale = 2 * KERNEL_WIDTH * max(1e-12, float((X**2).sum(axis=1).mean()))

    def kernel(A: np.ndarray) -> np.ndarray:
        squares = (A**2).sum(axis=1)[:, None] + (X**2).sum(axis=1) - 2 * A @ X.T
        near: np.ndarray = np.exp(-np.maximum(squares, 0) / scale)
        return near

    return kernel(at) @ np.linalg.solve(kernel(X) + KERNEL_NOISE * np.eye(len(X)), Y)

"""The aligned head: a shared-covariance Gaussian discriminant over all classes, from feature statistics instead of images.

The host keeps a mean for each class and one within-class scatter, never an image. As a new task moves the backbone, features
of old classes drift; nobody has their images, but the new task's images show the motion. It is fitted on their features f
before the task and f' after it (m: mean of f, c: mean of f' - f), and the old statistics follow it. Then every head row is
fitted again:

    motion        g(f) = f + c + (f - m) R + sum_i k(f, f_i) a_i
                  R = argmin ||(F - m) R - (F' - F - c)||^2 + ridge ||R||^2            what moves all features alike
                  a = (K + noise I)^-1 (F' - F - c - (F - m) R)                        and what only those nearby
                  k(f, f_i) = exp( -||f - f_i||^2 / (2 width v) ),  v = mean ||f_i - m||^2
    means         mu <- g(mu);  scatter <- (I + R)' scatter (I + R)
    discriminant  w_c = S^-1 (mu_c - mu),  b_c = -(mu_c - mu)' S^-1 (mu_c + mu) / 2,    mu = mean of the mu_c
                  S = (1 - s) * scatter / (n - C) + s * (tr / d) I                     (s: shrinkage)

A class learned alone moves no features, and its row alone is new. No answer changes if all logits are multiplied by one number and
shifted by one linear function of the features, so `beside` brings the fitted rows as near as that allows to a head's old rows, and
those stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHRINKAGE = 0.3
RIDGE = 500
"""as strong as so many images of mean variance"""
KERNEL_WIDTH, KERNEL_NOISE, KERNEL_POINTS = 0.5, 1.0, 2000
"""width and noise as above; the most images that are points of the kernel"""
SCALE = 5.0
"""the root mean square over classes of a class mean's own logit. It only sets how sure the softmax sounds; twice as large, float32's
rounding takes logits 1e-4 away from torch's, which export refuses"""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """means: float64 (C, d). scatter: float64 (d, d), summed over all images, each about its class mean. counts: int64 (C,),
    images of each class."""

    means: np.ndarray
    scatter: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, width: int) -> FeatureStatistics:
        return cls(np.zeros((0, width)), np.zeros((width, width)), np.zeros(0, np.int64))

    def drifted(self, before: np.ndarray, after: np.ndarray) -> FeatureStatistics:
        """Follow the backbone: the same new images' features (n, d) before and after the task."""
        if not len(self.means):
            return self
        before, after = before.astype(np.float64), after.astype(np.float64)
        middle, shift = before.mean(axis=0), (after - before).mean(axis=0)
        X, Y = before - middle, after - before - shift
        gram = X.T @ X
        R = np.linalg.solve(
            gram + RIDGE / len(X) * np.trace(gram) / len(gram) * np.eye(len(gram)), X.T @ Y
        )
        old, carry = self.means - middle, np.eye(len(R)) + R
        points = slice(None, None, -(-len(X) // KERNEL_POINTS))
        near = _kernel_ridge(X[points], (Y - X @ R)[points], old)
        return FeatureStatistics(
            middle + shift + old @ carry + near, carry.T @ self.scatter @ carry, self.counts
        )

    def with_images(
        self, features: np.ndarray, targets: np.ndarray, classes: int
    ) -> FeatureStatistics:
        """Add images of new or known classes: features (n, d), targets (n,) in [0, classes); classes >= C.

        Two groups of one class, n and m images, are pooled exactly (Chan et al., 1979): their scatters add up with
        n m / (n + m) times the outer product of their means' difference.
        """
        features = features.astype(np.float64)
        means, counts, scatter = (
            np.zeros((classes, features.shape[1])),
            np.zeros(classes, np.int64),
            self.scatter.copy(),
        )
        means[: len(self.means)], counts[: len(self.means)] = self.means, self.counts
        for c in np.unique(targets):
            own = features[targets == c]
            mean, n, m = own.mean(axis=0), len(own), counts[c]
            gap = mean - means[c]
            scatter += (own - mean).T @ (own - mean) + n * m / (n + m) * np.outer(gap, gap)
            means[c] += gap * n / (n + m)
            counts[c] = n + m
        return FeatureStatistics(means, scatter, counts)

    def discriminant(self, shrinkage: float = SHRINKAGE) -> tuple[np.ndarray, np.ndarray]:
        """(weight float32 (C, d), bias float32 (C,)) of the head that the statistics imply, equal priors."""
        classes, width = self.means.shape
        covariance = self.scatter / max(1, int(self.counts.sum()) - classes)
        S = (1 - shrinkage) * covariance + (
            shrinkage * np.trace(covariance) / width + 1e-12
        ) * np.eye(width)
        middle = self.means.mean(axis=0)
        weight = np.linalg.solve(S, (self.means - middle).T).T
        bias = -0.5 * (weight * (self.means + middle)).sum(axis=1)
        own = 0.5 * (weight * (self.means - middle)).sum(axis=1)
        scale = SCALE / max(1e-12, float(np.sqrt(np.mean(own**2))))
        return (weight * scale).astype(np.float32), (bias * scale).astype(np.float32)

    def beside(
        self, weight: np.ndarray, bias: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The head (weight float32 (K, d), bias float32 (K,)), K <= C, with `rows` alone fitted again: int (n,), new classes included."""
        fitted_weight, fitted_bias = self.discriminant()
        kept = np.setdiff1d(np.arange(len(weight)), rows)
        if not len(kept):
            return fitted_weight, fitted_bias
        old, new = weight[kept].astype(np.float64), fitted_weight[kept].astype(np.float64)
        aside, centred = old.mean(axis=0), new - new.mean(axis=0)
        spread = float((centred**2).sum())
        scale = (
            float(((old - aside) * centred).sum()) / spread if spread else 1.0
        )  # one row alone says nothing of it
        shift = (
            aside - scale * new.mean(axis=0),
            float((bias[kept] - scale * fitted_bias[kept]).mean()),
        )
        whole = (
            (scale * fitted_weight + shift[0]).astype(np.float32),
            (scale * fitted_bias + shift[1]).astype(np.float32),
        )
        whole[0][kept], whole[1][kept] = weight[kept], bias[kept]
        return whole


def _kernel_ridge(X: np.ndarray, Y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What a Gaussian kernel ridge regression of Y (n, d) on X (n, d), centred, says at other places (m, d)."""
    scale = 2 * KERNEL_WIDTH * max(1e-12, float((X**2).sum(axis=1).mean()))

    def kernel(A: np.ndarray) -> np.ndarray:
        squares = (A**2).sum(axis=1)[:, None] + (X**2).sum(axis=1) - 2 * A @ X.T
        near: np.ndarray = np.exp(-np.maximum(squares, 0) / scale)
        return near

    return kernel(at) @ np.linalg.solve(kernel(X) + KERNEL_NOISE * np.eye(len(X)), Y)

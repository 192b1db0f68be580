"""The aligned head: a shared-covariance Gaussian discriminant over all classes, from feature statistics instead of pictures.

The host keeps a mean for each class and one within-class scatter, never a picture. As a new task moves the backbone, features
of old classes drift; nobody has their pictures, but the new task's pictures show the motion: a ridge map is fitted from their
features before the task to those after it, and the old statistics are sent through it. Then every head row is fitted again:

    drift         f_after = f_before + (f_before - m) R + c,     R = argmin ||(F - m) R - (F' - F - c)||^2 + lambda ||R||^2
    discriminant  w_c = S^-1 (mu_c - mu),  b_c = -(mu_c - mu)' S^-1 (mu_c + mu) / 2,    mu = mean of the mu_c
                  S = (1 - s) * scatter / (n - C) + s * (tr / d) I                     (s: shrinkage)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHRINKAGE = 0.3
RIDGE = 0.1
"""relative to the mean variance of the features, for each picture"""
SCALE = 10.0
"""the root mean square over classes of a class mean's own logit, which only sets how sure the softmax sounds"""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """means: float64 (C, d). scatter: float64 (d, d), summed over all pictures, each about its class mean. count: of pictures."""

    means: np.ndarray
    scatter: np.ndarray
    count: int

    @classmethod
    def empty(cls, width: int) -> FeatureStatistics:
        return cls(np.zeros((0, width)), np.zeros((width, width)), 0)

    def drifted(self, before: np.ndarray, after: np.ndarray) -> FeatureStatistics:
        """Follow the backbone: the same new pictures' features (n, d) before and after the task."""
        if not len(self.means):
            return self
        before, after = before.astype(np.float64), after.astype(np.float64)
        middle, shift = before.mean(axis=0), (after - before).mean(axis=0)
        X, Y = before - middle, after - before - shift
        gram = X.T @ X
        R = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), X.T @ Y)
        carry = np.eye(len(R)) + R
        return FeatureStatistics(middle + shift + (self.means - middle) @ carry, carry.T @ self.scatter @ carry, self.count)

    def with_classes(self, features: np.ndarray, targets: np.ndarray, classes: int) -> FeatureStatistics:
        """Add new classes: features (n, d), targets (n,) in [0, classes)."""
        features = features.astype(np.float64)
        means = np.stack([features[targets == c].mean(axis=0) for c in range(classes)])
        within = features - means[targets]
        return FeatureStatistics(np.concatenate([self.means, means]), self.scatter + within.T @ within, self.count + len(features))

    def discriminant(self, shrinkage: float = SHRINKAGE) -> tuple[np.ndarray, np.ndarray]:
        """(weight float32 (C, d), bias float32 (C,)) of the head that the statistics imply, equal priors."""
        classes, width = self.means.shape
        covariance = self.scatter / max(1, self.count - classes)
        S = (1 - shrinkage) * covariance + (shrinkage * np.trace(covariance) / width + 1e-12) * np.eye(width)
        middle = self.means.mean(axis=0)
        weight = np.linalg.solve(S, (self.means - middle).T).T
        bias = -0.5 * (weight * (self.means + middle)).sum(axis=1)
        own = 0.5 * (weight * (self.means - middle)).sum(axis=1)
        scale = SCALE / max(1e-12, float(np.sqrt(np.mean(own**2))))
        return (weight * scale).astype(np.float32), (bias * scale).astype(np.float32)

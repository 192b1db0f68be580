"""Images that look alike to a model, in groups."""

from __future__ import annotations

import numpy as np

from ..fleet.extras import need

DISTANCE = 0.8
"""Mean cosine distance of two groups up to which they become one (tests/bench/alike.py)."""


def grouped(
    features: np.ndarray, centre: np.ndarray | None, distance: float = DISTANCE
) -> list[list[int]]:
    """Group images by average linkage over the cosine distance.

    The features are seen from the centre of the known classes: from there, one distance fits
    photographs and drawings alike. From zero, drawings would all be one group.

    Args:
        features: float32 (N, features).
        centre: float32 (features,). None: the mean of these images.
        distance: A lower one makes more groups.

    Returns:
        Indices of the images of each group: the largest group first, and in a group the image
        first that is most like the others.
    """
    cluster = need("sklearn.cluster", "host")
    if len(features) < 2:
        return [[i] for i in range(len(features))]
    seen = features.astype(np.float64) - (features.mean(axis=0) if centre is None else centre)
    seen /= np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-12)
    apart = np.clip(1 - seen @ seen.T, 0, 2)
    labels = cluster.AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=distance
    ).fit_predict(apart)
    groups = []
    for label in range(labels.max() + 1):
        (own,) = np.nonzero(labels == label)
        groups.append(own[np.argsort(apart[np.ix_(own, own)].mean(axis=1), kind="stable")].tolist())
    return sorted(groups, key=lambda own: (-len(own), own))

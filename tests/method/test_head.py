"""The aligned head: the discriminant of its equation, and statistics that follow a moving backbone."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from sdlora_edge.method import head
from sdlora_edge.method.head import FeatureStatistics


def gaussians(
    classes: int = 5, width: int = 6, each: int = 40, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width))
    targets = np.repeat(np.arange(classes), each)
    return (random.standard_normal((classes, width)) * 2)[targets] + random.standard_normal(
        (len(targets), width)
    ) @ mix, targets


def test_the_discriminant_is_that_of_scikit_learn() -> None:
    features, targets = gaussians()
    # Ours shrinks towards the diagonal, scikit-learn's towards the mean variance: with variances
    # of 1 within the classes that is the same.
    scatter = FeatureStatistics.empty(6).with_images(features, targets, 5).scatter
    features = features / np.sqrt(np.diag(scatter) / (len(features) - 5))
    shrinkage = ledoit_wolf_shrinkage(features)
    weight, bias = (
        FeatureStatistics.empty(6)
        .with_images(features, targets, 5)
        .discriminant(shrinkage=shrinkage)
    )
    ours = features @ weight.T + bias
    # scikit-learn's covariance divides by n, ours by n - C; the shrunk matrix is the same up to
    # that factor
    theirs = (
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.2] * 5)
        .fit(features, targets)
        .decision_function(features)
    )
    ours, theirs = (x - x.mean(axis=1, keepdims=True) for x in (ours, theirs))
    np.testing.assert_allclose(ours / ours.std(), theirs / theirs.std(), atol=0.02)


def test_classes_added_in_two_sessions_are_those_added_in_one() -> None:
    features, targets = gaussians()
    whole = FeatureStatistics.empty(6).with_images(features, targets, 5)
    first = targets < 2
    parts = (
        FeatureStatistics.empty(6)
        .with_images(features[first], targets[first], 2)
        .with_images(features[~first], targets[~first], 5)
    )
    np.testing.assert_allclose(parts.means, whole.means)
    np.testing.assert_allclose(parts.scatter, whole.scatter)
    np.testing.assert_array_equal(parts.counts, whole.counts)


def test_old_statistics_follow_a_backbone_that_moves_linearly() -> None:
    """Where the features move by an affine map, old means and scatter must be those of the moved
    old features."""
    random = np.random.default_rng(3)
    old, old_targets = gaussians(seed=1)
    new = random.standard_normal((4000, 6)) * 2 + 1
    turn, shift = np.eye(6) + 0.2 * random.standard_normal((6, 6)), random.standard_normal(6)
    before = FeatureStatistics.empty(6).with_images(old, old_targets, 5)
    followed = before.drifted(new, new @ turn + shift)
    truth = FeatureStatistics.empty(6).with_images(old @ turn + shift, old_targets, 5)
    left, moved = (
        np.abs(followed.means - truth.means).max(),
        np.abs(before.means - truth.means).max(),
    )
    assert left < 0.15 * moved
    assert (
        np.abs(followed.scatter - truth.scatter).max()
        < 0.3 * np.abs(before.scatter - truth.scatter).max()
    )


def test_without_old_classes_there_is_nothing_to_follow() -> None:
    empty = FeatureStatistics.empty(6)
    assert empty.drifted(np.ones((3, 6)), np.ones((3, 6))) is empty


def test_more_images_of_known_classes_are_pooled_exactly() -> None:
    """A new domain of old classes: as if all images had come at once."""
    features, targets = gaussians()
    random = np.random.default_rng(5)
    first = random.random(len(targets)) < 0.3
    parts = FeatureStatistics.empty(6).with_images(features[first], targets[first], 5)
    parts = parts.with_images(features[~first], targets[~first], 5)
    whole = FeatureStatistics.empty(6).with_images(features, targets, 5)
    np.testing.assert_allclose(parts.means, whole.means, atol=1e-10)
    np.testing.assert_allclose(parts.scatter, whole.scatter, atol=1e-8)
    np.testing.assert_array_equal(parts.counts, whole.counts)


def test_several_views_of_an_image_count_as_one_image() -> None:
    features, targets = gaussians()
    random = np.random.default_rng(6)
    views = features + 0.3 * random.standard_normal((4, *features.shape))
    found = FeatureStatistics.empty(6).with_images(views, targets, 5)
    one = FeatureStatistics.empty(6).with_images(features, targets, 5)
    np.testing.assert_array_equal(found.counts, one.counts)
    for c in range(5):
        own = views[:, targets == c].reshape(-1, 6)
        np.testing.assert_allclose(found.means[c], own.mean(axis=0))
    within = views.reshape(-1, 6) - found.means[np.tile(targets, 4)]
    np.testing.assert_allclose(found.scatter, within.T @ within / 4, atol=1e-8)
    nothing = found.with_images(views[:, :0], targets[:0], 5)
    np.testing.assert_array_equal(nothing.scatter, found.scatter)
    # the same image four times says nothing new
    same = FeatureStatistics.empty(6).with_images(np.stack([features] * 4), targets, 5)
    np.testing.assert_allclose(same.means, one.means)
    np.testing.assert_allclose(same.scatter, one.scatter, atol=1e-8)


def test_what_no_linear_map_moves_is_moved_by_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(1)
    old, new = random.standard_normal((40, 3)), random.standard_normal((1500, 3))

    def moved(features: np.ndarray) -> np.ndarray:
        return features + 0.7 * np.abs(features)  # as in a fold: linear on either side only

    statistics = FeatureStatistics(old, np.eye(3), np.ones(40, np.int64))
    error = np.abs(statistics.drifted(new, moved(new)).means - moved(old)).mean()
    monkeypatch.setattr(head, "_kernel_ridge", lambda X, Y, at: np.zeros_like(at))
    linear = np.abs(statistics.drifted(new, moved(new)).means - moved(old)).mean()
    assert error < 0.5 * linear
    assert linear > 0.1

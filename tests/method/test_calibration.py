"""Temperature and unknown score: each against the definition that its docstring names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdlora_edge.method import calibration
from sdlora_edge.method.calibration import Calibration, Judge, best_temperature
from sdlora_edge.method.head import FeatureStatistics

CLASSES, WIDTH, EACH = 6, 10, 60


def data(seed: int = 0, each: int = EACH) -> tuple[np.ndarray, np.ndarray]:
    """Images of the same six Gaussian classes, whatever the seed."""
    world, random = np.random.default_rng(7), np.random.default_rng(seed)
    mix, means = world.standard_normal((WIDTH, WIDTH)), world.standard_normal((CLASSES, WIDTH)) * 3
    targets = np.repeat(np.arange(CLASSES), each)
    return means[targets] + random.standard_normal((len(targets), WIDTH)) @ mix, targets


@pytest.fixture(scope="module")
def statistics() -> FeatureStatistics:
    return FeatureStatistics.empty(WIDTH).with_images(*data(), CLASSES)


@pytest.fixture(scope="module")
def judge(statistics: FeatureStatistics) -> Judge:
    return Judge(statistics, statistics.discriminant(), range(CLASSES))


def mahalanobis(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    away = features - mean
    found: np.ndarray = np.einsum("nd,nd->n", away, np.linalg.solve(covariance, away.T).T)
    return found


def test_without_its_second_line_the_score_is_the_relative_mahalanobis_distance(
    statistics: FeatureStatistics, judge: Judge
) -> None:
    features = np.random.default_rng(1).standard_normal((200, WIDTH)) * 5
    S, means = statistics.covariance(), statistics.means
    offsets = means - means.mean(axis=0)
    nearest = np.min([mahalanobis(features, mean, S) for mean in means], axis=0)
    whole = mahalanobis(features, means.mean(axis=0), S + offsets.T @ offsets / CLASSES)
    score = judge.confidence(Calibration.empty().after(10, 1.0, 0.0))
    logits_alone = replace(score, mean=score.mean[:0], precision=score.precision[:0])
    found = logits_alone.scores(judge.logits(features))
    wanted = (whole - nearest) / 2
    slope = np.polyfit(wanted, found, 1)[0]
    difference = found / slope - wanted
    assert np.ptp(difference) < 0.03 * np.ptp(wanted)  # the forms are rounded to int8


def test_the_second_line_grows_with_the_distance_from_all_classes(
    statistics: FeatureStatistics, judge: Judge
) -> None:
    """A direction that no class differs in shows in no logit."""
    weight = judge.head[0].astype(np.float64)
    *_, rest = np.linalg.svd(weight)
    unseen = rest[-1]  # orthogonal to all rows
    near = statistics.means[0][None]
    far = near + 100 * unseen
    score = judge.confidence(Calibration.empty().after(10, 1.0, 0.0))
    np.testing.assert_allclose(judge.logits(near), judge.logits(far), atol=1e-4)
    assert score.scores(judge.logits(far), far) < score.scores(judge.logits(near), near) - 1


def test_the_factor_is_that_between_the_heads_logits_and_the_discriminants_own(
    statistics: FeatureStatistics,
) -> None:
    weight, bias = statistics.discriminant()
    exact = np.linalg.solve(
        statistics.covariance(), (statistics.means - statistics.means.mean(axis=0)).T
    ).T
    wanted = float((weight * exact).sum() / (exact * exact).sum())
    rows = range(CLASSES)
    assert calibration._factor(statistics, (weight, bias), rows) == pytest.approx(wanted, 1e-5)
    # a linear function of the features that all logits share changes no answer
    shifted = (3 * weight + weight[0], bias)
    assert calibration._factor(statistics, shifted, rows) == pytest.approx(3 * wanted, 1e-5)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_the_temperature_of_answers_that_are_drawn_by_their_probabilities(
    temperature: float,
) -> None:
    random = np.random.default_rng(2)
    logits = random.standard_normal((20_000, 5)) * 2
    noise = random.gumbel(size=logits.shape)
    targets = (logits + noise).argmax(axis=1)  # by softmax(logits)
    assert best_temperature(logits * temperature, targets) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("each", [EACH, 4])
def test_as_many_images_are_accepted_as_promised(each: int) -> None:
    """With few images, too: 24 of them have more to fit than a shared covariance of ten features."""
    features, targets = data(each=each)
    own = FeatureStatistics.empty(WIDTH).with_images(features, targets, CLASSES)
    judge = Judge(own, own.discriminant(), range(CLASSES))
    confidence = judge.confidence(judge.measured(Calibration.empty(), *data(seed=3, each=40)))
    new, _ = data(seed=5, each=2000)
    accepted = confidence.known(judge.logits(new), new).mean()
    assert calibration.ACCEPTED - 0.03 < accepted < calibration.ACCEPTED + 0.03


def test_tasks_count_by_their_images() -> None:
    both = Calibration.empty().after(30, 2.0, -10.0).after(10, 4.0, -2.0)
    assert both.temperature == pytest.approx(2 ** (3 / 4) * 4 ** (1 / 4))
    assert both.threshold == pytest.approx(-8.0)


def test_with_one_class_or_nothing_measured_every_image_is_known(
    statistics: FeatureStatistics, judge: Judge
) -> None:
    assert not judge.confidence(Calibration.empty()).tells_unknown
    one = Judge(statistics, judge.head, [2])
    assert not one.confidence(Calibration.empty().after(9, 1.0, 0.0)).tells_unknown
    features, targets = data()
    assert not len(one.measured(Calibration.empty(), features[:20], targets[:20]).images)


def test_a_trained_head_has_a_temperature_and_no_threshold(judge: Judge) -> None:
    features, targets = data()
    trained = Judge(None, judge.head, range(CLASSES))
    measured = trained.measured(Calibration.empty(), features, targets)
    confidence = trained.confidence(measured)
    wanted = best_temperature(trained.logits(features), targets)
    assert float(confidence.temperature[0]) == pytest.approx(wanted, rel=1e-6)
    assert not confidence.tells_unknown

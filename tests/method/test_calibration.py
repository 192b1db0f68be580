"""Temperature and unknown score: each against the definition that its docstring names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdlora_edge.method import calibration
from sdlora_edge.method.calibration import TEMPERATURES, Calibration, Judge
from sdlora_edge.method.head import FeatureStatistics

CLASSES, WIDTH, EACH = 6, 10, 60
NOTHING = np.zeros((0, WIDTH))
ENOUGH = Calibration(np.zeros(len(TEMPERATURES)), np.zeros(calibration.FEW))


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
    return Judge(statistics, statistics.discriminant(), range(CLASSES), NOTHING)


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
    score = judge.confidence(ENOUGH)
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
    score = judge.confidence(ENOUGH)
    np.testing.assert_allclose(judge.logits(near), judge.logits(far), atol=1e-4)
    assert score.scores(judge.logits(far), far) < score.scores(judge.logits(near), near) - 1


def test_an_image_like_blank_ones_is_rejected_although_it_is_no_farther_away_than_others(
    statistics: FeatureStatistics,
) -> None:
    """All its distance lies in a feature that images of classes share theirs with nine others in."""
    known = Calibration.empty()
    middle, spread = statistics.means.mean(axis=0), statistics.spread(range(CLASSES))
    blank = middle + np.eye(WIDTH)[3] * 2.5 * spread
    near = (((data()[0] - middle) / spread) ** 2).sum(axis=1)
    assert (((blank - middle) / spread) ** 2).sum() < np.median(near)
    accepted = {}
    for name, seen in (("unseen", NOTHING), ("seen", blank[None])):
        judge = Judge(statistics, statistics.discriminant(), range(CLASSES), seen)
        score = judge.confidence(judge.measured(known, *data(seed=3)))
        accepted[name] = score.known(judge.logits(blank[None]), blank[None])[0]
        new, _ = data(seed=5, each=500)
        assert score.known(judge.logits(new), new).mean() > 0.92
    assert accepted == {"unseen": True, "seen": False}


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
    """In two tasks, the second of which has hardly an image."""
    random = np.random.default_rng(2)
    own = random.standard_normal((20_000, 5)) * 2
    targets = (own + random.gumbel(size=own.shape)).argmax(axis=1)  # by softmax(own)
    head = temperature * np.eye(5), np.zeros(5)
    judge, parts = Judge(None, head, range(5), NOTHING), (slice(19_997), slice(19_997, None))
    measured = Calibration.empty()
    for part in parts:
        measured = judge.measured(measured, own[part], targets[part])
    assert measured.temperature == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("each", [EACH, 4])
def test_as_many_images_are_accepted_as_promised(each: int) -> None:
    """With few images, too: 24 of them have more to fit than a shared covariance of ten features."""
    features, targets = data(each=each)
    own = FeatureStatistics.empty(WIDTH).with_images(features, targets, CLASSES)
    judge = Judge(own, own.discriminant(), range(CLASSES), NOTHING)
    confidence = judge.confidence(judge.measured(Calibration.empty(), *data(seed=3, each=40)))
    new, _ = data(seed=5, each=2000)
    accepted = confidence.known(judge.logits(new), new).mean()
    assert calibration.ACCEPTED - 0.03 < accepted < calibration.ACCEPTED + 0.03


def test_with_one_class_or_nothing_measured_every_image_is_known(
    statistics: FeatureStatistics, judge: Judge
) -> None:
    assert not judge.confidence(Calibration.empty()).tells_unknown
    one = Judge(statistics, judge.head, [2], NOTHING)
    assert not one.confidence(ENOUGH).tells_unknown
    features, targets = data()
    few = judge.measured(Calibration.empty(), *(x[: calibration.FEW - 1] for x in data()))
    assert not judge.confidence(few).tells_unknown
    assert not len(one.measured(Calibration.empty(), features, targets).scores)


def test_a_trained_head_has_a_temperature_and_no_threshold(judge: Judge) -> None:
    trained = Judge(None, judge.head, range(CLASSES), NOTHING)
    measured = trained.measured(Calibration.empty(), *data(seed=3))
    confidence = trained.confidence(measured)
    assert float(confidence.temperature[0]) == pytest.approx(measured.temperature)
    assert measured.temperature != 1.0
    assert not confidence.tells_unknown

"""Calibration and the rates of known and unknown images, on cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.train.reliability import (
    BINS,
    Acceptance,
    Bin,
    Threshold,
    acceptance,
    accepted,
    auroc,
    calibrated,
    calibration,
    thresholds,
)


def test_calibration_error_by_hand() -> None:
    # two bins of fifteen: (0.6, 0.667] with 0.62 and 0.64, one right; (0.933, 1] with two right
    confidence, correct = np.array([0.62, 0.95, 0.64, 1.0]), np.array([True, True, False, True])
    found = calibration(confidence, correct, 1.5)
    assert found.ece == pytest.approx((2 * abs(0.5 - 0.63) + 2 * abs(1.0 - 0.975)) / 4)
    assert len(found.bins) == BINS == 15
    assert [m for m, one in enumerate(found.bins) if one.count] == [9, 14]
    assert found.bins[9].to_dict() == pytest.approx(
        {"count": 2, "confidence": 0.63, "accuracy": 0.5}
    )
    assert found.bins[0] == Bin(0, 0.0, 0.0)
    assert found.temperature == 1.5
    assert (found.confidence, found.accuracy) == pytest.approx((3.21 / 4, 0.75))


def test_errors_of_opposite_sign_do_not_cancel_and_a_bin_includes_its_upper_edge() -> None:
    # too sure in one bin, too unsure in another
    found = calibration(np.array([0.9, 0.5]), np.array([False, True]))
    assert found.ece == pytest.approx((0.9 + 0.5) / 2)
    edge = calibration(np.array([3 / 15, 0.2001]), np.array([True, True]))
    assert [m for m, one in enumerate(edge.bins) if one.count] == [2, 3]


def test_auroc_counts_pairs_and_ties_half() -> None:
    # of 6 pairs (known, unknown): 2 > 1, 3 > 1, 3 > 2.5 and 2.5 > 1 are right, 2.5 = 2.5 is half
    assert auroc(np.array([2.0, 3.0, 2.5]), np.array([1.0, 2.5])) == pytest.approx(4.5 / 6)
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auroc(np.array([0.0]), np.array([1.0, 2.0])) == 0.0
    assert auroc(np.ones(4), np.ones(7)) == 0.5


def test_a_score_at_the_threshold_is_accepted() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert accepted(scores, 0.2) == 0.75
    assert accepted(scores, 0.5) == 0.0
    assert accepted(scores, None) == 1.0


def test_each_threshold_accepts_its_share_of_known_images_and_no_more() -> None:
    known, unknown = np.arange(100.0), np.arange(-50.0, 50.0)
    assert thresholds(known, unknown) == (
        Threshold(1.0, 0.99, 0.49),
        Threshold(5.0, 0.95, 0.45),
        Threshold(10.0, 0.9, 0.4),
        Threshold(20.0, 0.8, 0.3),
    )
    assert thresholds(np.array([1.0, 2.0]), unknown)[0].accepted == 1.0


@pytest.mark.parametrize("empty", [0, 1])
def test_nothing_can_be_said_without_images(empty: int) -> None:
    none, some = np.zeros(0), np.ones(2)
    with pytest.raises(ValueError, match="both"):
        auroc(*((none, some) if empty else (some, none)))
    with pytest.raises(ValueError, match="images"):
        accepted(none, 0.0)
    with pytest.raises(ValueError, match="images"):
        calibration(none, none)


def test_a_states_temperature_and_threshold_are_used() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [4.0, 0.0]], np.float32)
    wrong_once = np.array([True, False, True])
    plain = Confidence.none(2)
    single = np.exp([2.0, 1.0, 4.0]) / (1 + np.exp([2.0, 1.0, 4.0]))
    found = calibrated(plain, logits, wrong_once)
    assert (found.confidence, found.temperature) == (pytest.approx(single.mean()), 1.0)
    assert acceptance(plain, plain.scores(logits)) == Acceptance(1.0, None)
    strict = replace(
        plain, temperature=np.array([2.0], np.float32), threshold=np.array([2.0], np.float32)
    )
    halved = np.exp([1.0, 0.5, 2.0]) / (1 + np.exp([1.0, 0.5, 2.0]))
    found = calibrated(strict, logits, wrong_once)
    assert (found.confidence, found.temperature) == (pytest.approx(halved.mean()), 2.0)
    assert acceptance(strict, strict.scores(logits)) == Acceptance(pytest.approx(2 / 3), 2.0)

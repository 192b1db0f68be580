"""The metrics of METHOD.md, on a matrix worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora_edge.train.metrics import FEW, confusions, few, hter, per_class, recall, summary


def test_three_tasks_by_hand() -> None:
    # R = [[0.9], [0.5, 0.8], [0.7, 0.4, 1.0]] with 10, 20 and 30 test images
    found = summary([[9], [5, 16], [7, 8, 30]], [[10], [10, 20], [10, 20, 30]])
    assert found.accuracy == pytest.approx([0.9, 21 / 30, 45 / 60])
    assert found.last == pytest.approx(0.75)
    assert found.average_anytime == pytest.approx((0.9 + 0.7 + 0.75) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert found.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)


def test_forgetting_is_measured_from_the_best_not_from_the_first() -> None:
    found = summary([[5], [8, 10], [6, 10, 10]], [[10], [10, 10], [10, 10, 10]])
    assert found.forgetting == pytest.approx(((0.8 - 0.6) + 0.0) / 2)
    assert found.backward_transfer == pytest.approx(((0.6 - 0.5) + 0.0) / 2)


def test_a_task_that_lost_test_images_to_a_retired_class_is_scored_on_the_others() -> None:
    found = summary([[8], [3, 5]], [[10], [4, 10]])
    assert found.accuracy == pytest.approx([0.8, 8 / 14])
    assert found.forgetting == pytest.approx(0.8 - 0.75)


def test_one_task_has_nothing_to_forget() -> None:
    found = summary([[3]], [[4]])
    assert (
        found.last,
        found.average_anytime,
        found.forgetting,
        found.backward_transfer,
    ) == (0.75, 0.75, 0.0, 0.0)


def test_a_task_without_test_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="no test images are left after task 0"):
        summary([[0]], [[0]])


TRUTH, GUESS, NAMES = (
    np.array([0, 0, 0, 1, 1, 2]),
    np.array([0, 1, 1, 1, 0, 0]),
    ["a", "b", "c", "unseen"],
)


def test_the_classes_that_have_images_are_counted() -> None:
    assert per_class(TRUTH, GUESS, NAMES) == {"a": (1, 3), "b": (1, 2), "c": (0, 1)}


def test_recall_is_the_share_of_a_classs_own_images_worst_first() -> None:
    found = recall(per_class(TRUTH, GUESS, NAMES))
    assert list(found.items()) == [("c", 0.0), ("a", pytest.approx(1 / 3)), ("b", 0.5)]


def test_classes_with_fewer_than_ten_images_are_few_the_fewest_first() -> None:
    assert FEW == 10
    assert list(few({"a": 9, "b": 10, "c": 0, "d": 300}).items()) == [("c", 0), ("a", 9)]


def test_confusions_are_the_wrong_answers_most_frequent_first() -> None:
    assert confusions(TRUTH, GUESS, NAMES) == (("a", "b", 2), ("b", "a", 1), ("c", "a", 1))
    assert confusions(TRUTH, GUESS, NAMES, most=1) == (("a", "b", 2),)
    assert confusions(TRUTH, TRUTH, NAMES) == ()


SCORES = np.array([0.9, 0.8, 0.6, 0.3, 0.7, 0.4, 0.2, 0.1, 0.0])
GENUINE = np.array([True] * 4 + [False] * 5)


def test_hter_by_hand() -> None:
    # of 5 impostors one (0.7) reaches 0.5; of 4 genuine ones one (0.3) does not
    assert hter(SCORES, GENUINE, 0.5).to_dict() == pytest.approx(
        {"genuine": "", "far": 0.2, "frr": 0.25, "hter": 0.225, "threshold": 0.5}
    )
    # a score equal to the threshold is accepted
    assert hter(SCORES, GENUINE, 0.7).to_dict() == pytest.approx(
        {"genuine": "", "far": 0.2, "frr": 0.5, "hter": 0.35, "threshold": 0.7}
    )
    assert hter(SCORES, GENUINE, -1.0).hter == hter(SCORES, GENUINE, 2.0).hter == 0.5


@pytest.mark.parametrize("genuine", [[True, True], [False, False]])
def test_one_side_alone_has_no_hter(genuine: list[bool]) -> None:
    with pytest.raises(ValueError, match="both"):
        hter(np.array([0.1, 0.2]), np.array(genuine), 0.0)

"""The metrics of METHOD.md, on a matrix worked out by hand."""

from __future__ import annotations

import pytest

from sdlora_edge.train.metrics import summary


def test_three_tasks_by_hand() -> None:
    # R = [[0.9], [0.5, 0.8], [0.7, 0.4, 1.0]] with 10, 20 and 30 test pictures
    found = summary([[9], [5, 16], [7, 8, 30]], [10, 20, 30])
    assert found["accuracy"] == pytest.approx([0.9, 21 / 30, 45 / 60])
    assert found["last"] == pytest.approx(0.75)
    assert found["average_anytime"] == pytest.approx((0.9 + 0.7 + 0.75) / 3)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert found["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)


def test_forgetting_is_measured_from_the_best_not_from_the_first() -> None:
    found = summary([[5], [8, 10], [6, 10, 10]], [10, 10, 10])
    assert found["forgetting"] == pytest.approx(((0.8 - 0.6) + 0.0) / 2)
    assert found["backward_transfer"] == pytest.approx(((0.6 - 0.5) + 0.0) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    found = summary([[3]], [4])
    assert (found["last"], found["average_anytime"], found["forgetting"], found["backward_transfer"]) == (0.75, 0.75, 0.0, 0.0)


def test_a_task_without_test_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="without test pictures"):
        summary([[0]], [0])

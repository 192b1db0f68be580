"""Which images train a direction, and which measure what its answers are worth."""

from __future__ import annotations

import numpy as np

from sdlora_edge.train.lesson import held_out


def test_the_same_share_of_every_class_is_held_out() -> None:
    targets = np.repeat([0, 1, 2], [100, 14, 4])
    chosen = held_out(targets, 0.1, np.random.RandomState(0))
    # of a few images at least one; of a class with hardly any image none
    np.testing.assert_array_equal(np.bincount(targets[chosen], minlength=3), [10, 2, 0])
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, held_out(targets, 0.1, np.random.RandomState(0)))


def test_a_share_of_nothing_holds_nothing_out() -> None:
    assert not len(held_out(np.zeros(50, np.int64), 0.0, np.random.RandomState(0)))

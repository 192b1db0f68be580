"""Random crops of new images, for the statistics of the aligned head."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Fleet

from sdlora_edge.train import crops, splits
from sdlora_edge.train.crops import with_crops
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.run import Run


@pytest.fixture
def evaluator(fleet: Fleet) -> Evaluator:
    return Evaluator.at(Run.open(fleet.run), 1)


def few(evaluator: Evaluator, count: int) -> splits.Decoded:
    size = evaluator.run.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 255, (count, size, size, 3)).astype(np.uint8)
    return splits.Decoded(pixels, np.zeros(count, np.int64))


def test_crops_are_other_views_of_the_same_images_and_the_same_for_a_seed(
    evaluator: Evaluator,
) -> None:
    images = few(evaluator, 9)
    seen = evaluator.features(images)
    found = with_crops(evaluator, images, seed=1)
    assert found.shape == (4, *seen.shape)
    np.testing.assert_array_equal(found[0], seen)
    own = np.linalg.norm(found[1:] - seen, axis=-1)
    others = np.linalg.norm(found[1:] - np.roll(seen, 1, axis=0), axis=-1)
    assert own.min() > 0
    assert own.mean() < others.mean()
    np.testing.assert_array_equal(with_crops(evaluator, images, seed=1), found)
    assert not np.array_equal(with_crops(evaluator, images, seed=2)[1], found[1])


@pytest.mark.parametrize(("images", "views"), [(15, 4), (30, 2), (31, 1), (100, 1)])
def test_many_images_have_fewer_crops(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, images: int, views: int
) -> None:
    monkeypatch.setattr(crops, "UP_TO", 60)
    shown = few(evaluator, images)
    assert len(with_crops(evaluator, shown, seed=1)) == views

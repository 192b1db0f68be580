"""How long a task is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_images

from sdlora_edge.train import loop
from sdlora_edge.train.fit import steps_of
from sdlora_edge.train.settings import Settings


@pytest.mark.parametrize(
    ("task", "settings", "shown", "epochs"),
    [
        (2, {}, 240, 10),  # 4 steps an epoch: 40 steps
        (2, {}, 6400, 5),
        (2, {"min_steps": 0}, 240, 5),
        (1, {}, 240, 20),
        (1, {"first_task": 1.5}, 6400, 8),
        (1, {"base_classes": 3}, 240, 10),
    ],
)
def test_a_task_of_few_images_gets_more_epochs_and_the_first_one_twice_as_many(
    task: int, settings: dict[str, Any], shown: int, epochs: int
) -> None:
    config = Settings().changed(**{"epochs": 5, "batch_size": 64, **settings})
    assert steps_of(config, shown, task) == (epochs, math.ceil(shown / 64))


def test_the_first_task_of_a_run_is_trained_twice_as_long(
    tmp_path: Path, tiny_weights: str
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b", "c", "d"], 8, size=32)
    settings = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": tiny_weights,
        "tasks": 2,
        "epochs": 2,
        "min_steps": 0,
    }
    run = loop.train(Settings().changed(**settings, data=str(folder)), tmp_path / "run")
    assert [len(entry["losses"]) for entry in run.metrics] == [4, 2]

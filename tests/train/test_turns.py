"""Turned images as classes of their own: what a step shows, and what the head has afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import chain, model_of, small_vit

from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.method.sdlora import SDLoRA
from sdlora_edge.train import splits
from sdlora_edge.train.fit import Checkpoint, Training, fit
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.turns import draw_turns, rows_for_turns, turn

PREPARE = Preprocessing(8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3)


def images(count: int = 12) -> splits.Decoded:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (count, 8, 8, 3)).astype(np.uint8)
    return splits.Decoded(pixels, np.arange(count) % 2)


def model() -> SDLoRA:
    torch.manual_seed(5)
    backbone = small_vit()
    return model_of(backbone, chain(backbone, 1))


def trained(
    folder: Path, of: SDLoRA | None = None, **settings: object
) -> tuple[SDLoRA, list[float]]:
    learner = of or model()
    config = Settings().changed(
        **{"epochs": 4, "batch_size": 6, "lr": 0.1, "min_steps": 0, **settings}
    )
    training = Training(config, PREPARE, 2, Checkpoint(folder, "one"))
    return learner, fit(learner, images(), training)


def test_a_turned_image_belongs_to_the_class_of_its_turn() -> None:
    pixels, quarters = images(4).pixels, torch.tensor([0, 1, 2, 3])
    shown, targets = turn(pixels, torch.tensor([0, 1, 0, 1]), quarters, 2)
    assert targets.tolist() == [0, 3, 4, 7]
    np.testing.assert_array_equal(shown[0], pixels[0])
    np.testing.assert_array_equal(shown[1][::-1].swapaxes(0, 1), pixels[1])  # a quarter back
    np.testing.assert_array_equal(shown[2], pixels[2][::-1, ::-1])
    assert (shown[3] != pixels[3]).any()


def test_the_share_of_turned_images_is_the_one_asked_for_and_each_turn_is_as_frequent() -> None:
    drawn = draw_turns(8000, 0.6, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 8000
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.02, rtol=0)


def test_a_share_of_zero_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert not draw_turns(8, 0.0, generator).any()
    assert torch.equal(generator.get_state(), before)


def test_the_head_has_the_rows_of_the_classes_alone_after_a_task(tmp_path: Path) -> None:
    learner, losses = trained(tmp_path, turned=0.5)
    assert learner.head.weight.shape == (2, learner.head.in_features)
    assert losses[0] > 1.5  # it starts near log 8: eight classes, not two
    assert learner.head.weight.abs().max() > 0


def test_rows_of_turned_classes_start_at_zero_and_the_others_as_they_are() -> None:
    learner = model()
    own = learner.head.weight.detach().clone()
    with rows_for_turns(learner):
        wide = learner.head.weight.detach()
        assert len(wide) == 4 * len(own)
        torch.testing.assert_close(wide[: len(own)], own)
        assert not wide[len(own) :].any()


def test_a_training_that_stopped_goes_on_with_the_same_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, losses = trained(tmp_path / "a", turned=0.5)
    (tmp_path / "b").mkdir()
    stop = Checkpoint.save

    def save(self: Checkpoint, value: dict[str, object]) -> None:
        stop(self, value)
        if value["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", turned=0.5)
    monkeypatch.undo()
    again, rest = trained(tmp_path / "b", turned=0.5)
    assert rest == losses
    torch.testing.assert_close(again.head.weight, whole.head.weight, atol=0, rtol=0)

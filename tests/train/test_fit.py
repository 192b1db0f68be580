"""Training settings that must not change what is learned, and those that must; domains and known
classes."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_images
from networks import chain, model_of, small_vit
from PIL import Image

from sdlora_edge.errors import DivergedError, UsageError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.pictures import views
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.method.sdlora import SDLoRA
from sdlora_edge.state import TaskUpdate, changed_rows
from sdlora_edge.train import fit as fits
from sdlora_edge.train import loop, splits, task
from sdlora_edge.train.augment import augment, draw
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.fit import Checkpoint, Training, fit
from sdlora_edge.train.lesson import Lesson
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.source import SeedSplit

PREPARE = Preprocessing(8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3)


def images(count: int = 12) -> splits.Decoded:
    random = np.random.default_rng(0)
    return splits.Decoded(
        random.integers(0, 255, (count, 8, 8, 3)).astype(np.uint8), np.arange(count) % 2
    )


def trained(
    folder: Path,
    shown: splits.Images | None = None,
    **settings: object,
) -> SDLoRA:
    backbone = small_vit()
    torch.manual_seed(5)
    model = model_of(backbone, chain(backbone, 1))
    config = Settings().changed(
        **{"epochs": 3, "min_steps": 0, "batch_size": 6, "lr": 0.1, **settings}
    )
    fit(model, shown or images(), Training(config, PREPARE, 2, Checkpoint(folder, settings)))
    return model


def distance(a: SDLoRA, b: SDLoRA) -> float:
    return max(
        (x - y).abs().max().item()
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
        if x.requires_grad
    )


def test_parts_of_a_step_add_up_to_the_step(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a")
    assert distance(whole, trained(tmp_path / "b", accumulate=3)) < 1e-5
    assert distance(whole, trained(tmp_path / "c", batch_size=3)) > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(tmp_path: Path, precision: str) -> None:
    start, whole = trained(tmp_path / "a", lr=1e-9), trained(tmp_path / "b")
    half = trained(tmp_path / "c", precision=precision)
    assert 0 < distance(whole, half) < 0.2 * distance(whole, start)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert all(block.attn.fused_attn for block in half.backbone.blocks)  # type: ignore[union-attr]


def test_rates_reach_their_parts(tmp_path: Path) -> None:
    start = trained(tmp_path / "a", lr=1e-9)
    still = trained(tmp_path / "b", magnitude_lr_factor=1e-9, head_lr_factor=1e-3)
    assert (still.magnitudes - start.magnitudes).abs().max() < 1e-6
    assert (still.head.weight - start.head.weight).abs().max() < 1e-2
    assert still.B[0].abs().max() > 100 * start.B[0].abs().max() > 0


def test_images_that_do_not_fit_are_decoded_by_workers_and_train_alike(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 6, size=8)
    source = splits.load(str(folder), SeedSplit(0.2, 0))
    cached, streamed = (splits.read(source.train, source.classes, PREPARE, gb) for gb in (4.0, 0.0))
    assert isinstance(streamed, splits.Streamed)
    assert (
        distance(trained(tmp_path / "a", cached), trained(tmp_path / "b", streamed, workers=2)) == 0
    )


@pytest.mark.long
def test_a_compiled_step_is_the_same_step(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    assert (
        distance(trained(tmp_path / "a", epochs=1), trained(tmp_path / "b", epochs=1, compile=True))
        < 1e-4
    )


def test_a_crop_of_everything_is_the_image_and_a_flip_mirrors_it() -> None:
    shown = torch.rand(2, 3, 8, 8)
    whole = torch.tensor(
        [[1.0, 0.5, 0.5, 0.5, 0.9]] * 2
    )  # all of the area, square, centred, not mirrored
    torch.testing.assert_close(augment(shown, whole, "flip-crop"), shown, atol=1e-5, rtol=0)
    mirrored = whole.clone()
    mirrored[:, 4] = 0.1
    torch.testing.assert_close(
        augment(shown, mirrored, "flip-crop"), shown.flip(3), atol=1e-5, rtol=0
    )
    part = torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.9]] * 2)  # the smallest crop, top left
    corner = augment(shown, part, "crop")
    side = int(8 * 0.6**0.5)
    assert corner.mean().item() == pytest.approx(shown[:, :, :side, :side].mean().item(), abs=0.1)
    assert draw(4, "none", torch.Generator()).shape == (4, 5)


def test_views_are_made_of_the_images_and_of_nothing_else() -> None:
    shown = images(5).pixels
    found = views(shown, np.random.RandomState(0))
    assert found.shape == shown.shape
    assert found.dtype == np.uint8
    known = {tuple(p) for p in shown.reshape(-1, 3)}
    assert {tuple(p) for p in found.reshape(-1, 3)} <= known
    assert (found != shown).any()


DOMAIN = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 32,
    "protocol": "domain",
    "tasks": 2,
    "epochs": 1,
    "rank": "2",
    "test_fraction": 0.25,
}


@pytest.mark.parametrize("head", ["paper", "aligned"])
def test_a_new_domain_trains_the_same_head_rows(
    tmp_path: Path, tiny_weights: str, head: str
) -> None:
    folder = make_images(
        tmp_path / "p", ["day/cat", "day/dog", "night/cat", "night/dog"], 8, size=32
    )
    run = loop.train(
        Settings().changed(
            **{**DOMAIN, "data": str(folder), "weights": tiny_weights, "head": head}
        ),
        tmp_path / "run",
    )
    assert run.states[-1].classes == ("cat", "dog")
    assert [(e["name"], e["domains"], e["classes"]) for e in run.metrics] == [
        (d, [d], ["cat", "dog"]) for d in ("day", "night")
    ]
    assert (run.states[2].head_weight != run.states[1].head_weight).any()
    assert run.updates[1].classes == ()
    assert run.kept.frozen.counts.tolist() == [12, 12]
    assert len(run.metrics[-1]["correct"][-1]) == 2
    # and a third one, later, from a folder of its own, with one class that is new
    more = make_images(tmp_path / "fog", ["cat", "fox"], 8, size=32, seed=1)
    added = loop.add_task(run.path, str(more))
    assert added.states[-1].classes == ("cat", "dog", "fox")
    assert added.kept.frozen.counts.tolist() == [18, 12, 6]
    with pytest.raises(UsageError, match="learned already"):
        loop.add_task(run.path, str(more))


@pytest.mark.parametrize("head", ["paper", "aligned"])
def test_new_images_of_many_known_classes_reach_the_row_of_each(
    tmp_path: Path, tiny_weights: str, head: str
) -> None:
    """More than the rank of a step: the shipped head answers as the host wanted it to."""
    names = [f"{domain}/{i:02d}" for domain in ("day", "night") for i in range(24)]
    folder = make_images(tmp_path / "p", names, 4, size=32)
    asked = {**DOMAIN, "data": str(folder), "weights": tiny_weights, "head": head}
    run = loop.train(Settings().changed(**asked), tmp_path / "run")
    before, after = run.states[1:]
    aligned = run.kept.aligned
    wanted = (aligned.discriminant() if aligned else run.kept.plain)[0].astype(np.float64)
    lost, within = wanted - after.head_weight, wanted - before.head_weight
    if aligned:  # of a logit, and by how much it varies within a class
        lost = lost @ np.linalg.cholesky(aligned.around(range(24)))
        within = wanted @ np.linalg.cholesky(aligned.covariance())
    assert np.square(lost).sum() < 0.025 * np.square(within).sum()


def test_domains_need_a_pretrained_backbone_and_their_folders(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["cat", "dog"], 4)
    with pytest.raises(UsageError, match="domain"):
        splits.parts(
            splits.load(str(folder), SeedSplit(0.2, 0)),
            Settings().changed(protocol="domain", tasks=2),
        )


def test_limits_and_validation_take_training_images_only(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 20)
    source = splits.load(str(folder), SeedSplit(0.2, 0))
    (plain,) = splits.parts(source, Settings().changed(tasks=1))
    (held,) = splits.parts(source, Settings().changed(tasks=1, validate=0.25, train_limit=5))
    tested = {p.name for p in plain.test["a"]}
    assert (len(held.train["a"]), len(held.test["a"])) == (5, 4)
    assert not tested & {p.name for p in (*held.train["a"], *held.test["a"])}
    assert not {p.name for p in held.train["a"]} & {p.name for p in held.test["a"]}


def test_a_limit_counts_each_domain_alone(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "p", ["day/a", "day/b", "night/a", "night/b"], 10)
    source = splits.load(str(folder), SeedSplit(0.2, 0), domains=True)
    alone = splits.parts(source, Settings().changed(protocol="domain", tasks=2, train_limit=3))
    (both,) = splits.parts(source, Settings().changed(protocol="domain", tasks=1, train_limit=3))
    assert [p.domain for p in both.train["a"]] == ["day"] * 3 + ["night"] * 3
    assert [p.name for part in alone for p in part.train["a"]][:3] == [
        p.name for p in both.train["a"]
    ][:3]


def test_tensorboard_writes_events_of_losses_and_scores(tmp_path: Path, tiny_weights: str) -> None:
    pytest.importorskip("tensorboard")
    folder = make_images(tmp_path / "p", ["a", "b"], 4, size=32)
    settings = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": tiny_weights,
        "epochs": 1,
        "rank": "2",
    }
    run = loop.train(
        Settings().changed(**{**settings, "data": str(folder), "tasks": 1, "tensorboard": True}),
        tmp_path / "run",
    )
    (events,) = [p for p in (run.path / "events").iterdir() if b"loss/task 1" in p.read_bytes()]
    assert events.stat().st_size > 0


def test_the_run_records_versions_and_the_backbones_digest(
    tmp_path: Path, tiny_weights: str
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 4, size=32)
    Image.new("RGB", (32, 32)).save(folder / "a" / "more.png")
    settings = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": tiny_weights,
        "epochs": 1,
        "rank": "2",
    }
    run = loop.train(
        Settings().changed(**{**settings, "data": str(folder), "tasks": 1}), tmp_path / "run"
    )
    text = (run.path / "config.toml").read_text()
    assert f'torch = "{importlib.metadata.version("torch")}"' in text
    assert "backbone_sha256" in text


def test_a_loss_or_a_number_that_is_no_longer_finite_is_named_and_nothing_is_recorded(
    tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DivergedError,
        match=r"task 2 diverged: the loss of epoch . is not finite. .*smaller --lr than 1e\+06",
    ):
        trained(tmp_path / "a", lr=1e6, head_lr_factor=1e6, epochs=5, batch_size=2)
    original = fits._optimizer

    def spoiling(model: SDLoRA, *more: Any) -> torch.optim.Optimizer:
        optimizer = original(model, *more)
        optimizer.register_step_post_hook(lambda *_: model.B[0].data.fill_(float("inf")))
        return optimizer

    monkeypatch.setattr(fits, "_optimizer", spoiling)
    with pytest.raises(DivergedError, match="a number learned in epoch 1 is not finite"):
        trained(tmp_path / "b", batch_size=12, epochs=1)
    folder = make_images(tmp_path / "p", ["a", "b"], 4, size=32)
    settings = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": tiny_weights,
        "epochs": 1,
        "rank": "2",
        "tasks": 1,
    }
    with pytest.raises(
        DivergedError, match=r"task 1 diverged: .*this run keeps its earlier tasks"
    ) as caught:
        loop.train(Settings().changed(**{**settings, "data": str(folder)}), tmp_path / "run")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run" / "tasks" / "001").exists()


def test_numbers_that_no_device_takes_are_not_recorded() -> None:
    head = changed_rows(
        chain(small_vit(), 1)[-1], np.zeros((3, 16), np.float32), np.full(3, 1e5, np.float32)
    )
    with pytest.raises(DivergedError, match="it learned 100000, and 10000 is the largest number"):
        task._require_bounded(TaskUpdate(2, "t", ("x",), np.zeros(2), head, {}), Settings())


def test_a_direction_that_hardly_moves_is_said(
    tmp_path: Path, tiny_weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "p", ["a", "b"], 8, size=32)
    settings = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "weights": tiny_weights,
        "rank": "2",
        "tasks": 1,
        "min_steps": 0,
        "first_task": 1,
    }
    loop.train(
        Settings().changed(**{**settings, "data": str(folder), "epochs": 1}), tmp_path / "still"
    )
    assert (
        "task 1: after 1 step(s) its direction changes the weights by 0 of their norm"
        in caplog.text
    )
    caplog.clear()
    loop.train(
        Settings().changed(**{**settings, "data": str(folder), "epochs": 6, "batch_size": 4}),
        tmp_path / "moved",
    )
    assert "its direction" not in caplog.text


@pytest.mark.parametrize("most", [2000, 5])
def test_the_new_images_are_not_scored_twice_and_drift_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    scored: list[int] = []
    followed: list[tuple[np.ndarray, np.ndarray]] = []
    features, drifted = Evaluator.features, FeatureStatistics.drifted

    def counted(self: Evaluator, images: splits.Images) -> np.ndarray:
        scored.append(len(images))
        return features(self, images)

    def kept(self: FeatureStatistics, before: np.ndarray, after: np.ndarray) -> FeatureStatistics:
        followed.append((before, after))
        return drifted(self, before, after)

    monkeypatch.setattr(task, "VIEWS_UP_TO", most)
    monkeypatch.setattr(Evaluator, "features", counted)
    monkeypatch.setattr(FeatureStatistics, "drifted", kept)
    run = loop.train(
        Settings().changed(
            data=str(make_images(tmp_path / "p", ["a", "b", "c", "d", "e", "f"], 5, size=16)),
            backbone="micro_vit",
            image_size=16,
            base_classes=2,
            base_epochs=1,
            tasks=2,
            epochs=1,
            rank="2",
        ),
        tmp_path / "run",
    )
    new = run.metrics[-1]["training_images"]
    chosen = min(new, most)
    before, after = followed[-1]
    views_of_each = min(3, most // chosen - 1)
    assert before.shape == after.shape == (chosen * (1 + views_of_each), before.shape[1])
    assert scored.count(len(before)) == len(followed)  # once a task, under the old weights
    source = splits.load_for(run.config)
    part = splits.parts(source, run.config)[-1]
    images = splits.decode(part.train, part.classes, run.preprocessing, need=True)
    shown, _ = task._views(Lesson(run, part, images))
    for weights, seen in ((1, before), (2, after)):
        wanted = features(Evaluator.at(run, weights), images)[shown]
        np.testing.assert_allclose(seen[:chosen], wanted, atol=1e-5)

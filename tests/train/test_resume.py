"""Killed at any moment, stopped by Ctrl-C, or spread over two processes: the run ends as one that
nothing happened to."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_images

from sdlora_edge.errors import InputError
from sdlora_edge.train import loop
from sdlora_edge.train.config import to_toml
from sdlora_edge.train.fit import PARTIAL, Checkpoint
from sdlora_edge.train.run import Run
from sdlora_edge.train.settings import Settings

SETTINGS = {
    "min_steps": 0,
    "backbone": "micro_vit",
    "image_size": 16,
    "base_classes": 3,
    "base_epochs": 3,
    "tasks": 2,
    "rank": "2",
    "epochs": 8,
    "batch_size": 5,
    "augment": "flip-crop",
    "optimizer": "adamw",
    "lr": 0.01,
    "head": "aligned",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(
        tmp_path_factory.mktemp("data") / "p", [f"c{i}" for i in range(8)], 12, size=16
    )


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.train(config(images), tmp_path_factory.mktemp("runs") / "whole").path


def config(images: Path, **more: object) -> Settings:
    return Settings().changed(**{**SETTINGS, "data": str(images), **more})


def start(images: Path, run: Path, *command: str, **more: object) -> subprocess.Popen[str]:
    file = run.parent / "config.toml"
    file.write_text(to_toml(config(images, **more)))
    program = [
        *(command or (sys.executable, "-m")),
        "sdlora_edge",
        "train",
        "--config",
        str(file),
        "--out",
        str(run),
        "--json",
    ]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when(process: subprocess.Popen[str], there: Callable[[], bool], send: int) -> None:
    """Send a signal once something is there; fails where the process ends first."""
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(send)


def scores(run: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in Run.open(run).metrics]


def same(a: Path, b: Path) -> None:
    assert [s.digest for s in Run.open(a).states] == [s.digest for s in Run.open(b).states]
    assert scores(a) == scores(b)


def test_a_run_killed_again_and_again_ends_equal_to_the_digit(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(images, run)
    when(process, lambda: (run / PARTIAL).exists(), signal.SIGKILL)  # in the base session
    process.communicate()
    assert not (run / "backbone.safetensors").exists()
    places: list[Callable[[], bool]] = [
        lambda: (run / "tasks" / "000" / "metrics.json").exists() and (run / PARTIAL).exists(),
        lambda: (run / "tasks" / "001").is_dir() and (run / PARTIAL).exists(),
    ]
    again = [sys.executable, "-m", "sdlora_edge", "train", "--run", str(run)]
    for place in places:
        process = subprocess.Popen(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        when(process, place, signal.SIGKILL)
        process.communicate()
    left = len(Run.open(run).updates)
    assert left < 2
    loop.resume(run)
    same(run, whole)
    assert not (run / PARTIAL).exists()


def test_a_resumed_task_goes_on_at_its_epoch(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    saved: list[int] = []
    original = Checkpoint.save

    def save(self: Checkpoint, value: dict[str, object]) -> None:
        original(self, value)
        saved.append(value["epoch"])  # type: ignore[arg-type]
        if len(saved) == 3 + 5:  # five epochs into task 1
            raise Stopped

    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(Stopped):
        loop.train(config(images), tmp_path / "run")
    loop.resume(tmp_path / "run")
    assert saved[8:] == [6, 7, 8, *range(1, 9)]  # not one epoch again
    same(tmp_path / "run", whole)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(images, run)
    when(
        process,
        lambda: (run / "tasks" / "000" / "metrics.json").exists() and (run / PARTIAL).exists(),
        signal.SIGINT,
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"train --run {run}" in err
    assert "Traceback" not in err
    loop.resume(run)
    same(run, whole)


def test_a_damaged_or_foreign_checkpoint_only_costs_its_task(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(images, run)
    when(
        process,
        lambda: (run / "tasks" / "001").is_dir() and (run / PARTIAL).exists(),
        signal.SIGKILL,
    )
    process.communicate()
    (run / PARTIAL).write_bytes(b"torn")
    loop.resume(run)
    same(run, whole)


def test_two_processes_are_one_at_the_same_batch(images: Path, tmp_path: Path) -> None:
    """Gradients are summed in another order, so float16 factors may differ in their last bit, and
    nothing else."""
    settings: dict[str, object] = {"head": "paper", "optimizer": "sgd"}
    one = loop.train(config(images, **settings), tmp_path / "one")
    torchrun = (
        str(Path(sys.executable).with_name("torchrun")),
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
    )
    process = start(images, tmp_path / "two", *torchrun, **settings)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1  # the first process alone reports
    two = Run.open(tmp_path / "two")
    assert json.loads(out)["tasks"] == len(two.updates) == 2
    for a, b in zip(one.states[1:], two.states[1:], strict=True):
        np.testing.assert_allclose(a.magnitudes, b.magnitudes, atol=1e-4)
        np.testing.assert_allclose(a.head_weight, b.head_weight, atol=2e-3)
        for name in a.factors:
            np.testing.assert_allclose(
                a.factors[name].B.astype(np.float32) @ a.factors[name].A,
                b.factors[name].B.astype(np.float32) @ b.factors[name].A,
                atol=2e-3,
            )
    assert [e["correct"] for e in one.metrics][:1] == [e["correct"] for e in two.metrics][:1]


def test_a_stream_that_has_changed_is_not_gone_on_with(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    """Another class would shift classes between tasks that were learned already and those to come."""
    data, run = shutil.copytree(images, tmp_path / "p"), shutil.copytree(whole, tmp_path / "run")
    config = (run / "config.toml").read_text()
    assert str(images) in config
    (run / "config.toml").write_text(config.replace(str(images), str(data)))
    shutil.rmtree(run / "tasks" / "002")
    make_images(data, ["another"], 4, size=16)
    with pytest.raises(
        InputError, match="p has changed since task 1 was learned: put its classes back"
    ):
        loop.resume(run)
    shutil.rmtree(data / "another")
    assert len(loop.resume(run).updates) == 2

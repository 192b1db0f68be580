"""What an opened run holds, and how often a backbone is built."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL

from sdlora_edge.formats.encoding import Factors, encode
from sdlora_edge.method import backbones
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.state import TaskState, TaskUpdate, changed_rows
from sdlora_edge.train import history, loop, tasks
from sdlora_edge.train.config import resolve
from sdlora_edge.train.run import Run
from sdlora_edge.train.tasks import Kept, TaskResult

MANY = 60


def another(of: Run, random: np.random.Generator) -> TaskResult:
    """A task of one class with random directions."""
    before, kept = of.states[-1], of.kept
    row = random.standard_normal((1, before.head_weight.shape[1])).astype(np.float32)
    head = np.concatenate([before.head_weight, row]), np.append(before.head_bias, np.float32(0))
    factors = {
        p.name: encode(
            Factors(
                random.standard_normal((2, p.columns)),
                random.standard_normal((p.stop - p.start, 2)),
            ),
            "fp16",
        )
        for p in of.projections
    }
    task = before.task + 1
    deltas = np.append(np.zeros(task - 1), 0.25)
    rows = changed_rows(before, *head)
    update = TaskUpdate(task, f"task {task}", (f"class {task}",), deltas, rows, factors)
    plain = np.concatenate([kept.plain[0], row]), np.append(kept.plain[1], np.float32(0))
    frozen = kept.frozen.with_images(row, np.array([len(kept.plain[1])]), len(kept.plain[1]) + 1)
    return TaskResult(update, Kept(frozen, plain, frozen), factors, {"task": task, "name": "t"})


def held(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_a_run_of_many_tasks_holds_few_of_them(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown, random = Run.open(run_copy), np.random.default_rng(0)
    while len(grown.updates) < MANY:
        grown.append(another(grown, random))
    expected = grown.weights(MANY)
    digests = [state.digest for state in grown.states]
    del grown
    before = held(TaskState), held(TaskUpdate), held(FeatureStatistics)
    read: Counter[str] = Counter()
    load = tasks.load

    def counted(path: Path, without: str | None = None) -> Any:
        read[path.name] += 1
        return load(path, without)

    monkeypatch.setattr(tasks, "load", counted)
    opened = Run.open(run_copy)
    assert read == {"state.safetensors": MANY + 1}  # statistics of no task are read
    kept = [held(kind) - b for kind, b in zip((TaskState, TaskUpdate, FeatureStatistics), before)]
    assert kept[0] <= 2
    assert kept[1] == kept[2] == 0
    assert [state.digest for state in opened.states] == digests
    assert [update.task for update in opened.updates] == list(range(1, MANY + 1))
    for name, weight in opened.weights(MANY).items():
        np.testing.assert_array_equal(weight, expected[name])
    assert held(TaskState) - before[0] <= 2 + history.HELD_STATES
    assert held(TaskUpdate) - before[1] <= history.HELD_UPDATES
    read.clear()
    assert opened.kept.frozen.counts.shape == opened.kept.plain[1].shape
    assert read == {"statistics.safetensors": 1}
    assert opened.states[7].digest == digests[7]  # from first to last, or straight to one
    assert opened.states[-1].task == MANY


def test_training_builds_the_backbone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    create = backbones.create

    def counted(*arguments: Any, **options: Any) -> Any:
        built.append(arguments)
        return create(*arguments, **options)

    monkeypatch.setattr(backbones, "create", counted)
    settings = {**SMALL, "base_epochs": 1, "epochs": 1}
    trained = loop.train(resolve(None, settings), tmp_path / "run")
    assert len(built) == 1
    opened = Run.open(trained.path)
    assert opened.states[-1].digest == trained.states[-1].digest
    assert opened.preprocessing == trained.preprocessing
    for name, weight in opened.weights(2).items():
        np.testing.assert_array_equal(weight, trained.weights(2)[name])


def test_each_epoch_has_a_loss_and_without_a_terminal_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="sdlora_edge"):
        trained = loop.train(
            resolve(None, {**SMALL, "base_epochs": 1, "epochs": 2, "min_steps": 0}),
            tmp_path / "run",
        )
    for entry in trained.metrics[1:]:
        assert len(entry["losses"]) == 2
        assert all(loss > 0 for loss in entry["losses"])
    lines = [r.getMessage() for r in caplog.records if " of 2: loss" in r.getMessage()]
    assert [line.partition(":")[0] for line in lines if line.startswith("task 2")] == [
        "task 2, epoch 1 of 2",
        "task 2, epoch 2 of 2",
    ]

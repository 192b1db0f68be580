"""Runs: resumed, repeated, gone on with; and what is kept of the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Fleet, make_images

from sdlora_edge.errors import UsageError
from sdlora_edge.train import config, loop
from sdlora_edge.train.config import resolve
from sdlora_edge.train.folder import newest
from sdlora_edge.train.run import Run
from sdlora_edge.train.settings import Settings


def same(a: Path, b: Path) -> None:
    """Every task of two runs is equal to the bit, and so are the scores."""
    one, two = Run.open(a), Run.open(b)
    assert [s.digest for s in one.states] == [s.digest for s in two.states]
    timeless = [
        [{k: v for k, v in m.items() if k != "seconds"} for m in run.metrics] for run in (one, two)
    ]
    assert timeless[0] == timeless[1]


def test_a_killed_run_goes_on_at_its_task_and_ends_like_an_uninterrupted_one(
    fleet: Fleet, run_copy: Path
) -> None:
    shutil.rmtree(run_copy / "tasks" / "003")
    shutil.rmtree(run_copy / "tasks" / "002")
    (run_copy / "tasks" / ".tmp-002").mkdir()  # what a kill in the middle of writing leaves
    loop.resume(run_copy)
    same(run_copy, fleet.run)


def test_a_seed_gives_the_same_run_twice(fleet: Fleet, tmp_path: Path) -> None:
    loop.train(resolve(None, SMALL), tmp_path / "again")
    same(tmp_path / "again", fleet.run)


@pytest.mark.long
def test_the_default_learns_digits_and_the_aligned_head_keeps_them(tmp_path: Path) -> None:
    """The embedded default, as a newcomer runs it: well above what the plain head reaches (40 %)."""
    run = loop.train(resolve(None, {}), tmp_path / "runs" / "default")
    last = run.metrics[-1]
    assert len(last["correct"]) == 4
    assert last["accuracy"][0] > 0.97
    assert last["last"] > 0.80
    assert newest(tmp_path / "runs") == (tmp_path / "runs" / "default").resolve()


def test_old_directions_and_old_head_rows_never_change(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    for before, after in zip(run.states, run.states[1:], strict=False):
        old = len(before.classes)
        np.testing.assert_array_equal(after.head_weight[:old], before.head_weight)
        assert len(after.factors) == len(run.projections)
    deltas = run.updates[-1].deltas
    assert deltas.shape == (3,)
    assert (deltas != 0).all()  # all magnitudes are learned again


def test_one_more_task_from_nothing_but_a_new_folder(run_copy: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "week 32", ["bolt", "nut", "washer"], 8)
    run = loop.add_task(run_copy, str(folder))
    assert run.states[-1].classes[-3:] == ("bolt", "nut", "washer")
    entry = run.metrics[-1]
    assert (entry["name"], entry["training_images"], entry["source"]) == (
        "week 32",
        18,
        str(folder.resolve()),
    )
    assert len(entry["correct"][-1]) == 5
    assert entry["accuracy"][-1] == pytest.approx(sum(entry["correct"][-1]) / sum(entry["totals"]))
    same(run_copy, run.path)
    # the folder is gone: the next task is learned all the same, and that task is left out of the
    # score
    shutil.rmtree(folder)
    later = loop.add_task(run_copy, str(make_images(tmp_path / "week 33", ["gear", "hook"], 8)))
    assert later.metrics[-1]["correct"][-1][4] is None
    assert later.metrics[-1]["correct"][-1][0] is not None
    assert "last" not in later.metrics[-1]


def test_one_class_alone_or_an_unfinished_run_is_refused(run_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only one class"):
        loop.add_task(run_copy, str(make_images(tmp_path / "q", ["new"], 4)))
    shutil.rmtree(run_copy / "tasks" / "003")
    with pytest.raises(UsageError, match="resume it first"):
        loop.add_task(run_copy, str(make_images(tmp_path / "r", ["x", "y"], 4)))


def test_a_run_keeps_no_image(fleet: Fleet) -> None:
    """All that depends on the images is small: weights, head rows, factors, scores."""
    kept = {p.name for p in fleet.run.rglob("*") if p.is_file()}
    numbers = {
        "backbone.safetensors",
        "state.safetensors",
        "statistics.safetensors",
        "metrics.json",
    }
    assert kept == {"config.toml", "skipped.csv", "run.lock", *numbers}
    size = sum(p.stat().st_size for p in (fleet.run / "tasks").rglob("state.safetensors"))
    assert size < 60_000


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[data]\ndata = "x"\n[backbone]\nmean = [0, 0.5, 1]\n'
        "[method]\nrank = 3\n[training]\nlr = 1\n"
    )
    found = config.resolve(tmp_path / "c.toml", {"rank": "7", "lr": None})
    changed = {"data": "x", "rank": "7", "lr": 1.0, "mean": (0.0, 0.5, 1.0)}
    assert found.flat() == Settings().flat() | changed
    (tmp_path / "again.toml").write_text(config.to_toml(found))
    assert config.load(tmp_path / "again.toml") == found


@pytest.mark.parametrize(
    "values", [{"rank": 1.5}, {"lr": 0}, {"epochs": 0}, {"mean": [1]}, {"data": 3}, {"seed": True}]
)
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Settings().changed(**values)


def test_metrics_are_plain_json(fleet: Fleet) -> None:
    stored = json.loads((fleet.run / "tasks" / "003" / "metrics.json").read_text())
    assert {
        "task",
        "correct",
        "totals",
        "last",
        "average_anytime",
        "forgetting",
        "backward_transfer",
    } <= set(stored)
    assert [len(row) for row in stored["correct"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"magnitude_norm": "factors"}, "set magnitudes to reset"),
        ({"absorb": 0.5, "method": "lora"}, "absorb"),
        ({"method": "lora", "magnitude_norm": "factors", "magnitudes": "reset"}, "one magnitude"),
        ({"method": "lora", "rank": "4,3@2"}, "one rank"),
        ({"directions": "shared", "rank": "4,8@2"}, "only fall"),
        ({"std": [0, 0, 0]}, "std"),
        ({"magnitude_init": 0}, "magnitude_init"),
        ({"rank": "ten"}, "rank"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Settings().changed(**values)


def test_a_kill_before_the_base_was_scored_loses_nothing(fleet: Fleet, run_copy: Path) -> None:
    for task in ("003", "002", "001"):
        shutil.rmtree(run_copy / "tasks" / task)
    (run_copy / "tasks" / "000" / "metrics.json").unlink()
    loop.resume(run_copy)
    same(run_copy, fleet.run)


def test_a_folder_that_changed_is_not_scored_with_images_it_was_trained_on(
    run_copy: Path, tmp_path: Path
) -> None:
    folder = make_images(tmp_path / "w32", ["bolt", "nut"], 10)
    loop.add_task(run_copy, str(folder))
    make_images(folder, ["bolt"], 14, seed=7)
    later = loop.add_task(run_copy, str(make_images(tmp_path / "w33", ["gear", "hook"], 8)))
    assert later.metrics[-1]["correct"][-1][4] is None
    assert later.metrics[-1]["correct"][-1][5] is not None


@pytest.mark.parametrize("name", ["a\nb", " ", "x" * 300, "../up"])
def test_a_task_has_a_name_that_a_packet_may_carry(
    run_copy: Path, tmp_path: Path, name: str
) -> None:
    folder = make_images(tmp_path / "w32", ["bolt", "nut"], 4)
    before = sorted(run_copy.rglob("*"))
    with pytest.raises(UsageError, match=r"task's name .* give another --name"):
        loop.add_task(run_copy, str(folder), name)
    assert sorted(run_copy.rglob("*")) == before


def test_a_folder_is_learned_again_if_its_images_are_new(
    run_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_images(tmp_path / "new", ["x", "y"], 6)
    loop.add_task(run_copy, str(folder))
    with pytest.raises(UsageError, match="holds images that the run has learned already"):
        loop.add_task(run_copy, str(folder))
    for name in ("x", "y"):
        for path in sorted((folder / name).iterdir()):
            path.rename(path.with_name(f"later-{path.name}"))
    assert loop.add_task(run_copy, str(folder)).metrics[-1]["name"] == "new"
    shutil.rmtree(folder / "x")
    make_images(folder, ["z"], 6, seed=1)
    loop.add_task(run_copy, str(folder))
    assert "no longer has the classes of task 4: it is left out of the score" in caplog.text


def test_a_task_that_was_being_added_is_gone_on_with(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images(tmp_path / "week", ["x", "y"], 6)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learn_task", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.add_task(run_copy, str(folder), "week 32")
    run = loop.resume(run_copy)
    assert run.states[-1].classes[-2:] == ("x", "y")
    assert run.metrics[-1]["name"] == "week 32"
    assert len(loop.resume(run_copy).updates) == len(run.updates)  # nothing is left to do

"""Classes that retire, are renamed and come back: in the run, its scores, its packets, and on a
device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Fleet, Result, make_fleet, make_images
from sdlora_edge.export.packets import BuiltPacket, build_packets
from sdlora_edge.export.parity import host_logits

from sdlora_edge.cli.output import Table
from sdlora_edge.cli.packet import _built
from sdlora_edge.device import Device
from sdlora_edge.errors import UsageError
from sdlora_edge.inputs import canary
from sdlora_edge.state import UNUSED
from sdlora_edge.train import folder, loop
from sdlora_edge.train.evaluator import evaluate
from sdlora_edge.train.plan import ClassChanges
from sdlora_edge.train.run import Run

CHANGED = ClassChanges(("3", "nut"), {"bolt": "screw"})
AGAIN = ClassChanges(("gear",))


def in_a_row(run: Path, folder: Path) -> None:
    """Tasks 4 to 6: two new classes; changes alone; a class that retires in the task that brings it
    back, beside others."""
    loop.add_task(run, str(make_images(folder / "a", ["bolt", "nut", "gear"], 8)))
    loop.add_task(run, None, "tidy", CHANGED)
    back = make_images(folder / "b", ["nut", "gear", "screw"], 8, seed=1)
    loop.add_task(run, str(back), "again", AGAIN)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("changed")
    fleet = make_fleet(folder, SMALL | {"head": "aligned"})
    in_a_row(fleet.run, folder)
    return fleet


def test_rows_stay_where_they_are_and_names_come_back_as_new_rows(changed: Fleet) -> None:
    run = Run.open(changed.run)
    before, tidy, again = run.states[4:7]
    three, bolt, nut, gear = (before.classes.index(c) for c in ("3", "bolt", "nut", "gear"))
    assert run.updates[4].retired == tuple(sorted((three, nut)))
    assert run.updates[4].renamed == ((bolt, "screw"),)
    assert (tidy.classes[three], tidy.classes[nut], tidy.classes[bolt]) == (None, None, "screw")
    assert not run.updates[4].factors
    assert len(run.updates[4].head.index) == 0
    assert run.metrics[5]["packet_bytes"] < 4000
    kept = tidy.live
    np.testing.assert_array_equal(tidy.head_weight[kept], before.head_weight[kept])
    assert again.classes[-2:] == ("gear", "nut")
    assert again.classes[gear] is None
    for row in (three, nut, gear):
        assert not again.head_weight[row].any()
        assert again.head_bias[row] == np.float32(UNUSED)
        assert run.kept.plain[1][row] == np.float32(UNUSED)
    assert run.kept.aligned is not None
    assert run.kept.aligned.counts[[nut, gear, -2, -1]].tolist() == [6, 6, 6, 6]
    assert run.kept.aligned.counts[bolt] == 12  # new images of a class that has another name now


def test_the_head_is_fitted_to_live_classes_alone(changed: Fleet) -> None:
    run = Run.open(changed.run)
    statistics, state = run.kept.aligned, run.states[-1]
    assert statistics is not None
    live = np.array(state.live)
    alone = type(statistics)(statistics.means[live], statistics.scatter, statistics.counts[live])
    weight, bias = statistics.discriminant(state.live)
    seen = statistics.means[live]
    expected = seen @ alone.discriminant()[0].T + alone.discriminant()[1]
    found = (seen @ weight.T + bias)[:, live]
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert (seen @ weight.T + bias).argmax(axis=1).tolist() == live.tolist()


def test_scores_know_live_classes_only(changed: Fleet) -> None:
    run = Run.open(changed.run)
    before, tidy, last = run.metrics[4:7]
    assert (tidy["classes"], tidy["retired"], tidy["renamed"]) == (
        [],
        ["3", "nut"],
        {"bolt": "screw"},
    )
    assert sum(tidy["totals"]) < sum(before["totals"])
    assert tidy["counted"][4] == before["totals"]
    assert tidy["totals"][5] == 0
    assert "3" not in last["per_class"]
    assert {"screw", "nut", "gear"} <= last["per_class"].keys()
    assert not {"3", "bolt"} & {name for pair in last["confusions"] for name in pair[:2]}
    assert all(
        right <= total
        for row, totals in zip(last["correct"], last["counted"], strict=True)
        for right, total in zip(row, totals, strict=True)
    )
    assert 0 < last["last"] <= 1
    assert len(last["accuracy"]) == 7
    assert sum(total for _, total in last["per_class"].values()) == sum(last["totals"])


def test_eval_takes_the_names_of_today(
    changed: Fleet, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    folder = make_images(tmp_path / "p", ["screw", "nut"], 4, seed=2)
    value = evaluate(Run.open(changed.run), str(folder))
    assert value.per_class.keys() == {"screw", "nut"}
    assert value.classes == len(Run.open(changed.run).states[-1].names)
    run = Run.open(changed.run)  # its own source still calls them by their old names
    digits = evaluate(run, "digits")
    assert digits.per_class.keys() == set("012456789")
    assert digits.total < evaluate(run, "digits", 3).total
    assert cli("eval", "--run", changed.run, "--data", "digits").code == 0
    week = evaluate(run, str(Path(run.metrics[4]["source"])))
    assert week.per_class.keys() == {"screw"}
    old = make_images(tmp_path / "q", ["bolt", "3"], 4)
    done = cli("eval", "--run", changed.run, "--data", old)
    assert (done.code, "know the classes 3, bolt (retired: 3): " in done.err) == (2, True)
    assert cli("eval", "--run", changed.run, "--data", old, "--task", 4).code == 0


def test_a_device_follows_and_never_answers_a_retired_class(changed: Fleet, tmp_path: Path) -> None:
    built = build_packets(changed.run, changed.bundle, changed.key, out=tmp_path / "packets")
    run, device = Run.open(changed.run), Device.init(changed.bundle, tmp_path / "store")
    inputs = canary.inputs(7, run.preprocessing, 64)
    for task, packet in enumerate(sorted((tmp_path / "packets").iterdir()), 1):
        device.apply(packet)
        state, logits = run.states[task], device.logits(inputs)
        logits = logits if logits.shape[1] == len(state.live) else logits[:, state.live]
        np.testing.assert_allclose(logits, host_logits(run, task, inputs), atol=1e-4)
    assert len(built) == 6
    pixels = [
        np.asarray(p)
        for p in (np.random.default_rng(0).integers(0, 255, (32, 20, 20, 3))).astype(np.uint8)
    ]
    answers = {prediction.top[0][0] for prediction in device.predict(pixels)}
    assert answers <= set(run.states[-1].names)


@pytest.mark.parametrize("images", [True, False])
def test_a_task_that_changes_classes_goes_on_after_a_kill(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: bool
) -> None:
    folder = str(make_images(tmp_path / "week", ["x", "3"], 6)) if images else None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    changes = ClassChanges(("3",), {"4": "four"})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.add_task(run_copy, folder, "week 32", changes)
    run = loop.resume(run_copy)
    assert run.metrics[-1]["name"] == "week 32"
    assert ("four" in run.states[-1].names, "4" in run.states[-1].names) == (True, False)
    assert ("3" in run.states[-1].names, "x" in run.states[-1].names) == (images, images)
    assert Run.open(run_copy).states[-1].digest == run.states[-1].digest
    assert len(loop.resume(run_copy).updates) == len(run.updates)


def test_changes_that_do_not_fit_the_run_are_refused(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "tasks" / "003")
    with pytest.raises(UsageError, match="resume it first"):
        loop.add_task(run_copy, None, "t", ClassChanges(("3",)))
    loop.resume(run_copy)
    for changes, what in (
        (ClassChanges(("cat",)), "no live class 'cat'"),
        (ClassChanges(("3",), {"3": "x"}), "both retired and renamed"),
        (ClassChanges((), {"3": "4"}), "two classes would be called '4'"),
    ):
        with pytest.raises(UsageError, match=what):
            loop.add_task(run_copy, None, "t", changes)
    run = loop.add_task(run_copy, None, "t", ClassChanges(("3",)))
    with pytest.raises(UsageError, match="no live class '3'"):
        loop.add_task(run_copy, None, "u", ClassChanges(("3",)))
    assert len(run.states[-1].names) == 9


def test_a_task_is_removed_with_those_after_it(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    run = Path(shutil.copytree(fleet.run, tmp_path / "run"))
    shutil.rmtree(run / "tasks" / "002")
    for more in ([], ["--retire", "3"]):
        result = cli("train", "--run", run, *more)
        assert result.code == 2, result
        assert "holds 003, but no 002: remove the tasks after a removed one too" in result.err
    shutil.rmtree(run / "tasks" / "003")
    folder.require_no_gap(run)


def test_packet_build_shows_what_a_task_changes_even_without_a_canary() -> None:
    facts = ("int8", 0, 0.0, 0, 0, 1600, 1, 1)
    built = BuiltPacket(
        Path("4.sdlora"), 4, "task", (), ("nut",), (("bolt", "screw"),), *facts, None, None
    )
    shown, changes = _built([built])
    assert isinstance(shown, Table)
    assert shown.rows[0][-1] == "not run"
    assert changes == "task 4: retires nut, renames bolt to screw"
    assert built.to_dict()["canary_difference"] is None

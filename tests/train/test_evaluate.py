"""Scoring any folder: equal to the run's own score on the same images, and honest about which
images count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, Result, make_images

from sdlora_edge.cli.train import _summary
from sdlora_edge.errors import InputError
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.train import reliability, splits, unknown_images
from sdlora_edge.train.config import resolve
from sdlora_edge.train.evaluator import class_answers, evaluate, images_of, unknown_scores
from sdlora_edge.train.folder import training_images
from sdlora_edge.train.loop import train
from sdlora_edge.train.metrics import Hter, binary
from sdlora_edge.train.reliability import Acceptance, Rejection
from sdlora_edge.train.run import Run
from sdlora_edge.train.score import _certainty, _Tally
from sdlora_edge.train.score import test_images as readable_images


@pytest.fixture(scope="module")
def tested(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's own test images, as a folder of PNG files."""
    folder, run = tmp_path_factory.mktemp("tested"), Run.open(fleet.run)
    for found in readable_images(run, len(run.updates)).values():
        for label, images in (found or {}).items():
            (folder / label).mkdir()
            for i, image in enumerate(images):
                image.open().save(folder / label / f"{i}.png")
    return folder


def test_equals_the_runs_own_score_on_the_same_images(
    fleet: Fleet, tested: Path, cli: Callable[..., Result]
) -> None:
    done = cli("eval", "--run", fleet.run, "--data", tested, "--json")
    assert done.code == 0, done.err
    value, last = json.loads(done.out), Run.open(fleet.run).metrics[-1]
    assert (value["correct"], value["total"]) == (sum(last["correct"][-1]), sum(last["totals"]))
    assert value["accuracy"] == pytest.approx(last["last"])
    assert sum(right for right, _ in value["per_class"].values()) == value["correct"]
    assert sum(count for *_, count in value["confusions"]) <= value["total"] - value["correct"]
    assert value["images"] == "all"
    assert value["hter"] is None


def test_the_text_is_worst_first(fleet: Fleet, tested: Path, cli: Callable[..., Result]) -> None:
    out = cli("eval", "--run", fleet.run, "--data", tested).out
    shown = [float(line.split()[1]) for line in out.split("\n\n")[1].splitlines()[1:]]
    assert len(shown) == 10
    assert shown == sorted(shown)
    assert out.startswith("accuracy ")


def test_an_earlier_task_knows_only_its_own_classes(
    fleet: Fleet, tested: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    run = Run.open(fleet.run)
    assert cli("eval", "--run", fleet.run, "--data", tested, "--task", 0).code == 2
    for label in run.states[0].classes:
        shutil.copytree(tested / label, tmp_path / label)
    assert evaluate(run, str(tmp_path), 0).correct == run.metrics[0]["correct"][0][0]


def test_of_the_runs_own_source_only_what_it_did_not_train_on(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    value = evaluate(run, "digits")
    assert value.images == "the run's own test images"
    assert value.accuracy == pytest.approx(run.metrics[-1]["last"])


def test_of_a_split_only_the_test_side(fleet: Fleet, tmp_path: Path) -> None:
    make_images(tmp_path / "train", ["1", "2"], 5)
    make_images(tmp_path / "test", ["1", "2"], 3)
    value = evaluate(Run.open(fleet.run), str(tmp_path))
    assert (value.images, value.total) == ("test/", 6)
    assert evaluate(Run.open(fleet.run), str(tmp_path / "train")).total == 10


def test_a_zip_is_scored_as_its_folder_is(fleet: Fleet, tmp_path: Path) -> None:
    make_images(tmp_path / "set" / "test", ["1", "2"], 3)
    make_images(tmp_path / "set" / "train", ["1", "2"], 2)
    run, zipped = (
        Run.open(fleet.run),
        shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "set"),
    )
    folder, archive = evaluate(run, str(tmp_path / "set")), evaluate(run, zipped)
    assert replace(archive, data="") == replace(folder, data="")
    assert archive.total == 6


def test_what_the_run_cannot_score(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    make_images(tmp_path / "new", [f"new{i}" for i in range(7)] + ["1"], 2)
    done = cli("eval", "--run", fleet.run, "--data", tmp_path / "new")
    assert done.code == 2
    assert "new0, new1, new2, new3, new4, ..." in done.err
    assert "new5" not in done.err
    assert cli("eval", "--run", fleet.run, "--data", tmp_path / "nowhere").code == 3
    assert cli("eval", "--run", fleet.run, "--data", tmp_path / "new", "--task", 99).code == 2
    assert cli("eval", "--run", fleet.run).code == 2
    (tmp_path / "damaged" / "1").mkdir(parents=True)
    (tmp_path / "damaged" / "1" / "a.png").write_bytes(b"no image")
    assert cli("eval", "--run", fleet.run, "--data", tmp_path / "damaged").code == 3


def test_two_classes_are_scored_by_hter(tmp_path: Path, cli: Callable[..., Result]) -> None:
    names = ["a", "b", "live", "spoof"]
    seed = next(
        s for s in range(100) if set(splits.task_classes(names, 2, 1, s)[0]) == {"live", "spoof"}
    )
    settings = {
        "data": str(make_images(tmp_path / "set", names, 8)),
        "backbone": "micro_vit",
        "image_size": 16,
        "seed": seed,
    }
    run = train(
        resolve(None, settings | {"base_classes": 2, "tasks": 1, "base_epochs": 1, "epochs": 1}),
        tmp_path / "run",
    )
    make_images(tmp_path / "two", ["live", "spoof"], 6, seed=5)
    found = evaluate(run, str(tmp_path / "two"), 0)
    by_class, hter = found.per_class, found.hter
    assert hter is not None
    assert hter.genuine == "live"
    assert hter.frr == pytest.approx(1 - by_class["live"][0] / 6)
    assert hter.far == pytest.approx(1 - by_class["spoof"][0] / 6)
    out = cli("eval", "--run", run.path, "--data", tmp_path / "two", "--task", 0).out
    assert f"HTER {100 * hter.hter:.2f} % (lower is better)" in out
    assert "at least 0," in out
    shutil.rmtree(tmp_path / "two" / "spoof")
    assert "no HTER" in cli("eval", "--run", run.path, "--data", tmp_path / "two", "--task", 0).out


def test_the_genuine_class_is_the_one_so_named_else_the_first() -> None:
    scores, truth = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]], np.float32), np.array([0, 1, 1])
    found = binary(scores, truth, ["attack", "Real"])
    assert found == Hter("Real", 0.25, 0.0, 0.5, 0.0)
    found = binary(scores, truth, ["attack", "other"])
    assert found == Hter("attack", 0.25, 0.5, 0.0, 0.0)


def knowing(path: Path, threshold: float, temperature: float = 2.0) -> Run:
    """The run, whose newest state was given a temperature and a threshold by hand."""
    run = Run.open(path)
    state = run.states[-1]
    confidence = replace(
        Confidence.none(len(state.live)),
        temperature=np.array([temperature], np.float32),
        threshold=np.array([threshold], np.float32),
    )
    run.history.newest = replace(state, confidence=confidence)
    return run


def test_calibration_and_known_images_are_those_of_the_states_own_answers(
    fleet: Fleet, tested: Path
) -> None:
    plain = Run.open(fleet.run)
    before = evaluate(plain, tested)
    answers = class_answers(plain, plain.states[-1], images_of(plain, str(tested))[0])
    best = answers.logits.max(axis=1)
    found = evaluate(knowing(fleet.run, float(np.median(best))), tested)
    assert found.accuracy == before.accuracy == pytest.approx(found.calibration.accuracy)
    wide = np.exp((answers.logits - best[:, None]).astype(np.float64) / 2)
    assert found.calibration.temperature == 2.0
    assert found.calibration.confidence == pytest.approx((1 / wide.sum(axis=1)).mean())
    assert sum(one.count for one in found.calibration.bins) == found.total
    assert found.unknown.accepted == pytest.approx((best >= np.float32(np.median(best))).mean())
    assert 0.4 < found.unknown.accepted < 0.6
    assert before.unknown == Acceptance(1.0, None)
    assert found.recall == {c: right / n for c, (right, n) in found.per_class.items()}


def test_unknown_images_are_counted_without_those_of_known_classes(
    fleet: Fleet, tested: Path, tmp_path: Path
) -> None:
    run = Run.open(fleet.run)
    answers = class_answers(run, run.states[-1], images_of(run, str(tested))[0])
    others = make_images(tmp_path / "others", ["gear", "hook"], 150)
    files = unknown_images.find(str(others), (), 10**6).images
    scores = unknown_scores(run, run.states[-1], files)
    assert len(scores) == 300  # more than one batch
    threshold = float(np.median(scores))
    shutil.copytree(tested / "3", others / "3")
    found = evaluate(knowing(fleet.run, threshold), tested, unknown=others).unknown
    assert isinstance(found, Rejection)
    assert (found.images, found.left_out, found.data) == (300, ("3",), str(others))
    assert found.false_accept == pytest.approx((scores >= np.float32(threshold)).mean())
    pairs = answers.known[:, None] - scores[None, :]
    assert found.auroc == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
    shares = [choice.accepted for choice in found.thresholds]
    assert all(share >= least for share, least in zip(shares, reliability.SHARES, strict=True))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no readable image: add images"):
        evaluate(run, tested, unknown=damaged)


def test_the_command_names_unknown_rates_and_classes_with_few_images(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    make_images(tmp_path / "set", ["1", "2"], 11)
    make_images(tmp_path / "set", ["3"], 9)
    make_images(tmp_path / "others", ["1", "gear"], 4)
    asked = ["eval", "--run", fleet.run, "--data", tmp_path / "set"]
    done = cli(*asked, "--unknown", tmp_path / "others")
    assert done.code == 0, done.err
    temperature = Run.open(fleet.run).states[-1].confidence.temperature[0]
    fitted = f"temperature {temperature:.3g}"
    for shown in ("calibration error (ECE)", fitted, "AUROC", "of 4 are accepted"):
        assert shown in done.out, shown
    assert "known classes left out: 1" in done.out
    assert "unknown: never answered after this task" in done.out
    assert "warning: fewer than 10 test images, so recall is coarse: 3 9: add" in done.out
    value = json.loads(cli(*asked, "--json").out)
    assert value["few"] == {"test": {"3": 9}, "training": {}}
    assert value["unknown"] == {"accepted": 1.0, "threshold": None}
    assert len(value["calibration"]["bins"]) == 15
    assert cli(*asked, "--unknown", tmp_path / "nowhere").code == 3


def test_training_images_are_counted_by_todays_names() -> None:
    entries = [
        {"task": 1, "training_by_class": {"a": 4, "b": 30, "c": 9}},
        {"task": 2, "renamed": {"a": "A"}, "retired": ["c"], "training_by_class": {"b": 2}},
        {"task": 3, "training_by_class": {"c": 5}},
    ]
    assert training_images(entries, 2) == {"A": 4, "b": 32}
    assert training_images(entries, 3) == {"A": 4, "b": 32, "c": 5}


def test_the_runs_own_metrics_hold_calibration_and_images_of_each_class(
    fleet: Fleet,
) -> None:
    run = Run.open(fleet.run)
    last, found = run.metrics[-1], evaluate(run, "digits")
    assert last["calibration"]["ece"] == pytest.approx(found.calibration.ece, abs=1e-4)
    assert last["calibration"]["temperature"] == found.calibration.temperature
    assert "unknown" not in last
    counts = training_images(run.metrics, len(run.updates))
    assert sum(counts.values()) == sum(entry["training_images"] for entry in run.metrics)


def test_a_task_that_can_answer_unknown_records_what_it_accepts() -> None:
    tally = _Tally(
        logits=[np.array([[2.0, 0.0]]), np.array([[0.0, 1.0]])],
        known=[np.array([-1.0]), np.array([-5.0])],
    )
    plain, correct = Confidence.none(2), np.array([True, True])
    strict = replace(plain, threshold=np.array([-2.0], np.float32))
    assert _certainty(strict, tally, correct)["unknown"] == {"accepted": 0.5, "threshold": -2.0}
    assert set(_certainty(plain, tally, correct)) == {"calibration"}
    assert _certainty(plain, _Tally(), np.zeros(0, bool)) == {}


def test_the_table_at_the_end_of_train_shows_both(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    entry = run.metrics[-1]
    run.metrics[-1] = entry | {"unknown": {"accepted": 0.9531, "threshold": -2.0}}
    (scores, _) = _summary(run)
    assert not isinstance(scores, str)
    rows = dict(scores.rows)
    assert rows["calibration error (ECE)"] == f"{100 * entry['calibration']['ece']:.2f} %"
    assert rows["accepted as known"] == "95.31 %"

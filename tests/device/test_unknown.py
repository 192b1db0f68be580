"""Temperature and threshold travel in the packet: they take force with it, survive a restart, and go back with the state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Fleet, Result, images, inputs, with_file
from sdlora_edge.export.issuing import squash_packets
from sdlora_edge.export.parity import host_logits
from telling import between, packets, telling

from sdlora_edge.device import Device
from sdlora_edge.device.answers import Answered, Asked
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import HealthError, InputError
from sdlora_edge.formats.current import Current
from sdlora_edge.selftest import checks
from sdlora_edge.selftest.kit import Kit
from sdlora_edge.selftest.load import hot_swap
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]
EXPORT = ("device", "export-weights", "--format", "adapter", "--store")


@pytest.fixture(scope="module")
def run(fleet: Fleet) -> Run:
    return Run.open(fleet.run)


def expected(run: Run, device: Device, task: int, values: tuple[float | None, float]) -> list[bool]:
    """What the device must answer, and a check of everything else that it says."""
    state, logits = run.states[task], host_logits(run, task, inputs(device))
    own = telling(state, *values)
    for row, score, answer in zip(
        own.probabilities(logits), own.scores(logits), device.predict(images(), top=20), strict=True
    ):
        probabilities = dict(zip(state.names, row, strict=True))
        assert dict(answer.top) == pytest.approx(probabilities, abs=1e-4)
        assert answer.score == pytest.approx(score, abs=1e-3)
        assert answer.threshold == values[0]
        assert answer.answer == (answer.label if answer.known else None)
    return own.known(logits).tolist()


def known(device: Device) -> list[bool]:
    return [answer.known for answer in device.predict(images())]


@pytest.mark.parametrize("swap", [DOUBLE_BUFFER, IN_PLACE])
def test_each_packet_brings_its_own_and_a_rollback_takes_it_back(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path, cli: Cli, swap: str
) -> None:
    device = Device.open(store, swap=swap)
    values = [(between(run, device, 1), 2.0), (None, 3.0), (between(run, device, 3), 0.5)]
    flashed = run.states[0].confidence
    assert (device.status().threshold, device.status().temperature) == (
        flashed.least,
        float(flashed.temperature[0]),
    )
    assert known(device) == [True] * 6, "the bundle tells no unknown"
    files, told = packets(run, fleet, tmp_path / "telling", values), []
    for task, (file, own) in enumerate(zip(files, values, strict=True), 1):
        device.apply(file)
        told.append(expected(run, device, task, own))
        for one in (device, Device.open(store)):  # and after a restart
            assert known(one) == told[-1]
            assert (one.status().threshold, one.status().temperature) == own
    assert [sum(one) for one in told] == [3, 6, 3]
    shown = cli("device", "status", "--store", store)
    assert f"threshold      {values[2][0]:.4g}" in shown.out
    assert "temperature    0.5" in shown.out
    for task in (2, 1):
        device.rollback()
        assert known(device) == known(Device.open(store)) == told[task - 1]
        assert device.status().threshold == values[task - 1][0]
        assert expected(run, device, task, values[task - 1]) == told[task - 1]
    device.rollback()
    assert (known(device), device.status().threshold) == ([True] * 6, None)
    assert "none, so nothing is unknown" in cli("device", "status", "--store", store).out


def test_a_threshold_of_the_caller_holds_for_that_call_alone(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path, cli: Cli
) -> None:
    device = Device.open(store)
    own = between(run, device, 1)
    device.apply(packets(run, fleet, tmp_path / "telling", [(own, 1.0)])[0])
    scores = sorted(answer.score for answer in device.predict(images()))
    for least, count in ((scores[0] - 1, 6), (scores[5] + 1, 0), (own, 3)):
        answers = device.predict(images(), threshold=least)
        assert sum(answer.known for answer in answers) == count
    assert sum(known(device)) == 3


def test_a_squash_brings_the_values_of_its_last_task(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path
) -> None:
    device = Device.open(store)
    values = [(between(run, device, 1), 2.0), (between(run, device, 2), 3.0), (None, 4.0)]
    files = packets(run, fleet, tmp_path / "telling", values)
    for count in (2, 3):
        squash_packets(files[:count], str(fleet.key), tmp_path / f"{count}.sdlora")
        Device.init(fleet.bundle, tmp_path / f"store{count}")
        squashed = Device.open(tmp_path / f"store{count}")
        squashed.apply(tmp_path / f"{count}.sdlora")
        own = values[count - 1]
        assert (squashed.status().threshold, squashed.status().temperature) == own
        assert known(squashed) == expected(run, squashed, count, own)
    for file in files:
        device.apply(file)
    assert device.predict(images(), top=20)[0].top == squashed.predict(images(), top=20)[0].top
    assert device.status().state == squashed.status().state


def test_current_json_follows_the_packets(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path, cli: Cli
) -> None:
    values = [(-1.5, 2.0), (None, 3.0)]
    out = tmp_path / "out" / "a.onnx_adapter"
    for file, (threshold, temperature) in zip(
        packets(run, fleet, tmp_path / "telling", values), values, strict=True
    ):
        assert cli("device", "apply", file, "--store", store).code == 0
        assert cli(*EXPORT, store, "--out", out).code == 0
        current, device = Current.read(out.parent), Device.open(store)
        assert current is not None
        assert (current.confidence["threshold"], current.confidence["temperature"]) == (
            threshold,
            temperature,
        )
        assert len(current.confidence["weight"][0]) == len(device.status().classes)


def test_under_load_no_answer_mixes_two_generations(fleet: Fleet, run: Run, tmp_path: Path) -> None:
    files = packets(run, fleet, tmp_path / "telling", [(-1.0, 2.0), (-2.0, 3.0), (None, 0.5)])
    (tmp_path / "scratch").mkdir()
    found = hot_swap(Kit(fleet.bundle, tuple(files), tmp_path / "scratch"), updates=6)
    assert (found.failed, found.mixed) == (0, 0)


def test_selftest_asks_for_images_that_show_nothing(fleet: Fleet, run: Run, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    values = [(None, 1.0), (1e6, 1.0), (1e5, 1.0)]
    kit = Kit(
        fleet.bundle,
        tuple(packets(run, fleet, tmp_path / "strict", values)),
        tmp_path / "scratch",
    )
    assert checks.unknown(kit) == checks.Strangeness(4, 2, 30)
    assert checks.unknown(replace(kit, chain=tuple(fleet.packets))).answers == 0
    lax = packets(run, fleet, tmp_path / "lax", [(1e6, 1.0), (-1e6, 1.0)])
    with pytest.raises(HealthError, match=r"15 of 30 images .* 'black 1' is .* in task 2 \(score"):
        checks.unknown(replace(kit, chain=tuple(lax)))


def test_a_watcher_applies_them(fleet: Fleet, run: Run, store: Path, tmp_path: Path) -> None:
    shutil.copytree(
        packets(run, fleet, tmp_path / "telling", [(-1.0, 2.0)])[0].parent, tmp_path / "in"
    )
    report = Watcher(tmp_path / "in", store, emit=lambda *_: None).look(settled=False)
    assert json.loads(json.dumps(report.to_dict()))["task"] == 1
    assert Device.open(store).status().threshold == -1.0


def without_features(bundle: Path, folder: Path) -> Path:
    """A copy of the bundle whose model has no output `features`."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    del model.graph.output[1:]
    return with_file(bundle, folder, "model.onnx", model.SerializeToString())


def test_a_score_may_need_the_features_which_are_another_output(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path
) -> None:
    (file,) = packets(run, fleet, tmp_path / "telling", [(0.0, 2.0)], away=True)
    device, state = Device.open(store), run.states[1]
    before = [answer.top for answer in device.predict(images())]
    device.apply(file)
    seen = Evaluator.at(run, 1, exact=True).features_of(inputs(device))
    logits, own = host_logits(run, 1, inputs(device)), telling(state, 0.0, 2.0, away=True)
    scores = own.scores(logits, np.asarray(seen))
    assert scores.std() > 0.1
    for one in (device, Device.open(store)):
        answers = one.predict(images())
        assert [answer.score for answer in answers] == pytest.approx(scores.tolist(), abs=1e-2)
    device.rollback()
    assert [answer.top for answer in device.predict(images())] == before


def test_an_answer_can_come_with_what_the_model_saw(
    fleet: Fleet, run: Run, store: Path, tmp_path: Path
) -> None:
    device = Device.open(store)
    right = np.asarray(Evaluator.at(run, 0, exact=True).features_of(inputs(device)))
    first, error, *rest = device.answer_each([images()[0], b"", *images()[1:]], Asked(2), 4)
    assert isinstance(error, InputError)
    for answer, row in zip([first, *rest], right, strict=True):
        assert isinstance(answer, Answered)
        assert answer.features is not None
        np.testing.assert_allclose(answer.features, row, atol=1e-3)
    assert [a.prediction for a in (first, *rest)] == list(device.predict_each(images(), 2))  # type: ignore[union-attr]
    without = Device.init(without_features(fleet.bundle, tmp_path / "bundle"), tmp_path / "other")
    (answer,) = without.answer_each(images()[:1], Asked())
    assert isinstance(answer, Answered)
    assert answer.features is None


def test_a_packet_whose_score_needs_features_is_refused_if_the_model_gives_none(
    fleet: Fleet, run: Run, tmp_path: Path
) -> None:
    """Otherwise the device could not answer any more."""
    bundle = without_features(fleet.bundle, tmp_path / "bundle")
    (file,) = packets(run, fleet, tmp_path / "telling", [(0.0, 2.0)], away=True)
    device = Device.init(bundle, tmp_path / "store")
    with pytest.raises(HealthError, match=r"task 1 needs the model's output `features`"):
        device.apply(file)
    assert known(device) == known(Device.open(tmp_path / "store")) == [True] * 6
    assert device.status().task == 0

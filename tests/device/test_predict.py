"""What `predict` takes: one image of each kind, or many; anything else is a TypeError that says so."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result
from PIL import Image

from sdlora_edge.device import Device, Prediction
from sdlora_edge.device.answers import Asked, best
from sdlora_edge.device.engines import Outputs
from sdlora_edge.errors import HealthError, NothingToDo, UsageError
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.inputs.modality import count
from sdlora_edge.state import TaskState

Cli = Callable[..., Result]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture
def device(store: Path) -> Device:
    return Device.open(store, threads=1)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_one_image_of_each_kind_gets_one_answer(device: Device, photo: Path) -> None:
    right = device.predict(PIXELS)
    assert isinstance(right, Prediction)
    data = photo.read_bytes()
    with Image.open(photo) as opened:
        for image in (str(photo), photo, data, io.BytesIO(data), opened):
            assert device.predict(image) == right
            # a batch of two may be rounded in another way
            assert [answer.label for answer in device.predict([image, PIXELS])] == [right.label] * 2
    assert device.predict(PIXELS[None]) == [right]
    assert device.predict([]) == []


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (bytearray, "a bytearray"),
        (memoryview, "a memoryview"),
        (lambda data: io.BufferedReader(io.BytesIO(data)), "a BufferedReader"),
        (lambda data: {"photo.png": data}, "a dict"),
        (lambda data: 5, "an int"),
        (lambda data: None, "a NoneType"),
        (lambda data: [5], "an int"),
        (lambda data: [[PIXELS]], "a list"),
        (lambda data: PIXELS.astype(np.float32), r"a float32 array \(16, 16, 3\)"),
        (lambda data: PIXELS[None].astype(np.int64), r"an int64 array \(16, 16, 3\)"),
        (lambda data: PIXELS[0, 0], r"a uint8 array \(3,\)"),
    ],
)
def test_what_is_no_image_is_named(
    device: Device, photo: Path, make: Callable[[bytes], Any], what: str
) -> None:
    with pytest.raises(TypeError, match=f"^{what} is no image: pass a path"):
        device.predict(make(photo.read_bytes()))


@pytest.mark.parametrize("wrong", [{"top": 0}, {"top": -1}, {"batch_size": 0}, {"batch_size": -1}])
def test_less_than_one_class_or_image_is_a_wrong_call(
    device: Device, wrong: dict[str, int]
) -> None:
    """top=-1 left out the least likely class; batch_size=0 gave no answers and no error."""
    with pytest.raises(UsageError, match="must be at least 1"):
        device.predict(PIXELS, **wrong)
    with pytest.raises(UsageError, match="must be at least 1"):
        list(device.predict_each([PIXELS], **wrong))


def test_more_classes_than_are_live_are_all_of_them(device: Device) -> None:
    answer = device.predict(PIXELS, top=10**9)
    assert {name for name, _ in answer.top} == set(device.status().classes)
    assert sum(score for _, score in answer.top) == pytest.approx(1, abs=1e-6)


def state(classes: tuple[str | None, ...], confidence: Confidence | None = None) -> TaskState:
    """A state of these classes; without a confidence it tells no unknown."""
    none, live = np.zeros(0, np.float32), sum(name is not None for name in classes)
    own = confidence or Confidence.none(live)
    return TaskState(1, "t", "0" * 64, classes, none, none, none, {}, confidence=own)


def confidence(threshold: float | None, temperature: float = 1.0) -> Confidence:
    """score = max logit - (0.5 (a - b) + 1)^2, for two classes."""
    limit = [] if threshold is None else [threshold]
    numbers = ([temperature], [0.5], [1.0], limit)
    t, scale, bias, least = (np.array(values, np.float32) for values in numbers)
    none = np.zeros(0, np.float16)
    return Confidence(t, np.array([[1, -1]], np.int8), scale, bias, none, none, least)


def answers(
    logits: list[list[float]], of: TaskState, features: np.ndarray | None = None, **asked: Any
) -> list[Any]:
    return list(best(Outputs(np.array(logits, np.float32), features), of, 1, Asked(**asked)))


def test_retired_rows_take_no_part_whatever_their_logit_is() -> None:
    for logit in (-1e30, float("-inf"), float("nan"), 1e30):
        for classes, logits in (
            (("a", None, "b"), [1.0, logit, 2.0]),
            ((None, "a", "b"), [logit, 1.0, 2.0]),
        ):
            (answer,) = answers([logits], state(classes, confidence(0.0)), top=5)
            assert [name for name, _ in answer.top] == ["b", "a"]
            assert sum(p for _, p in answer.top) == pytest.approx(1)
            assert (answer.score, answer.known) == (2 - (0.5 * (1 - 2) + 1) ** 2, True)


def test_a_device_without_any_class_says_so() -> None:
    with pytest.raises(NothingToDo, match="no class yet"):
        answers([[]], state(()))


def test_an_image_with_too_low_a_score_is_unknown_and_keeps_its_best_guess() -> None:
    far, near = answers([[3.0, 1.0], [1.0, 3.0]], state(("a", "b"), confidence(0.5)))
    assert (far.score, near.score) == (3 - (0.5 * 2 + 1) ** 2, 3 - (0.5 * -2 + 1) ** 2) == (-1, 3)
    assert (far.known, far.answer, far.label) == (False, None, "a")
    assert (near.known, near.answer, near.label) == (True, "b", "b")
    assert far.threshold == near.threshold == 0.5
    assert far.confidence == near.confidence == pytest.approx(1 / (1 + np.exp(-2)))
    (just,) = answers([[1.0, 3.0]], state(("a", "b"), confidence(3.0)))
    assert just.known, "the threshold itself is known"
    assert far.to_dict() == {
        "known": False,
        "score": -1.0,
        "threshold": 0.5,
        "generation": 1,
        "top": [{"class": "a", "probability": far.confidence}],
    }


def test_a_threshold_of_the_caller_replaces_the_states_own() -> None:
    for own in (0.5, None):
        of = state(("a", "b"), confidence(own))
        for given, known in ((-1.0, True), (-0.9, False), (100.0, False), (-100.0, True)):
            (answer,) = answers([[3.0, 1.0]], of, threshold=given)
            assert (answer.known, answer.threshold, answer.score) == (known, given, -1)
            assert type(answer.known) is bool


def test_a_state_without_a_threshold_knows_everything() -> None:
    for of in (state(("a", "b")), state(("a", "b"), confidence(None))):
        for answer in answers([[-1e38, -3e38], [3e38, -3e38], [0.0, 0.0]], of):
            assert (answer.known, answer.threshold) == (True, None)
            assert np.isfinite(answer.score)


def test_the_temperature_flattens_probabilities_and_moves_no_answer() -> None:
    hot, cold = (
        answers([[2.0, 1.0]], state(("a", "b"), confidence(0.5, t)), top=2)[0] for t in (4.0, 0.25)
    )
    assert hot.confidence == pytest.approx(1 / (1 + np.exp(-1 / 4)))
    assert cold.confidence == pytest.approx(1 / (1 + np.exp(-1 / 0.25)))
    assert (hot.label, hot.score, hot.known) == (cold.label, cold.score, cold.known)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error_of_their_image_alone(wrong: float) -> None:
    """They were answered with the first class and a probability of NaN, which is no JSON."""
    for of in (state(("a", "b")), state(("a", "b"), confidence(0.5))):
        first, bad, last = answers([[1.0, 3.0], [wrong, 3.0], [1.0, 3.0]], of)
        assert isinstance(bad, HealthError)
        assert "not finite" in str(bad)
        assert first == last
        assert (first.answer, first.known) == ("b", True)


def test_an_image_far_from_all_classes_in_features_alone_is_unknown() -> None:
    own = replace(
        confidence(-5.0),
        mean=np.array([1.0, 2.0], np.float16),
        precision=np.array([0.5, 2.0], np.float16),
    )
    features = np.array([[1.0, 2.0], [3.0, 3.0], [9.0, 2.0]], np.float32)
    near, far, farther = answers([[1.0, 3.0]] * 3, state(("a", "b"), own), features)
    assert [a.score for a in (near, far, farther)] == [3, 3 - 1 - 4, 3 - 16]
    assert [a.known for a in (near, far, farther)] == [True, True, False]
    features[1, 0] = np.nan
    one, damaged, other = answers([[1.0, 3.0]] * 3, state(("a", "b"), own), features)
    assert (one, other) == (near, farther)
    assert isinstance(damaged, HealthError)


def test_a_damaged_engine_is_an_error_and_no_answer(
    device: Device, photo: Path, cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = type(device._engine).outputs

    def damaged(self: Any, loaded: Any, inputs: dict[str, np.ndarray]) -> Outputs:
        found = outputs(self, loaded, inputs)
        if count(inputs) == 3:  # not the canary, which has two images
            found.logits[1] = np.nan
        return found

    monkeypatch.setattr(type(device._engine), "outputs", damaged)
    right, bad, _ = device.predict_each([PIXELS] * 3)
    assert isinstance(right, Prediction)
    assert isinstance(bad, HealthError)
    with pytest.raises(HealthError, match="not finite"):
        device.predict([PIXELS] * 3)
    result = cli("device", "predict", photo, photo, photo, "--store", store, "--json")
    entries = json.loads(result.out)["predictions"]
    assert (result.code, [entry.get("known") for entry in entries]) == (6, [True, None, True])
    assert entries[1]["error"]["exit_code"] == 6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_threshold_that_is_no_number_is_a_wrong_call(
    device: Device, photo: Path, cli: Cli, store: Path, wrong: float
) -> None:
    """Every comparison with NaN is false: all images would be unknown."""
    with pytest.raises(UsageError, match="must be a finite number"):
        device.predict(PIXELS, threshold=wrong)
    refused = cli("device", "predict", photo, "--store", store, "--threshold", wrong)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)


def test_the_command_says_unknown_first_and_the_best_guess_behind_it(
    photo: Path, cli: Cli, store: Path
) -> None:
    predict = ("device", "predict", photo, "--store", store)
    (known,) = json.loads(cli(*predict, "--json").out)["predictions"]
    assert (known["known"], known["threshold"]) == (True, None)
    above = known["score"] + 1
    (shown,) = json.loads(cli(*predict, "--threshold", above, "--json").out)["predictions"]
    assert shown == {**known, "known": False, "threshold": above}
    (best,) = known["top"]
    guess = f"{best['class']} {100 * best['probability']:.1f} %"
    assert cli(*predict).out == f"{photo}: {guess}\n"
    lack = f"score {known['score']:.4g} < {above:.4g}"
    unknown = cli(*predict, "--threshold", above)
    assert unknown.out == f"{photo}: unknown (best guess: {guess}; {lack})\n"
    assert unknown.code == 0
    assert cli(*predict, "--threshold", -1e9).out == f"{photo}: {guess}\n"
    more = cli(*predict, "--threshold", above, "--top", 2).out
    assert more.startswith(f"{photo}: unknown (best guesses: {guess}, ")

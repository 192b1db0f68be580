"""What `predict` takes: one image of each kind, or many; anything else is a TypeError that says so."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora_edge.device import Device, Prediction
from sdlora_edge.device.answers import best
from sdlora_edge.errors import NothingToDo, UsageError

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


def test_retired_rows_take_no_part_whatever_their_logit_is() -> None:
    for logit in (-1e30, float("-inf"), float("nan"), 1e30):
        logits = np.array([[1.0, logit, 2.0]], np.float32)
        (answer,) = best(logits, ("a", None, "b"), 1, 5)
        assert [name for name, _ in answer.top] == ["b", "a"]
        assert sum(score for _, score in answer.top) == pytest.approx(1)


def test_a_device_without_any_class_says_so() -> None:
    with pytest.raises(NothingToDo, match="no class yet"):
        list(best(np.zeros((1, 0), np.float32), (), 1, 1))

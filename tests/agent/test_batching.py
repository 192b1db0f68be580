"""Requests that come together are answered together, all or none, within the bounds."""

from __future__ import annotations

import gc
import io
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from agents import encoded
from conftest import within
from PIL import Image

from sdlora_edge.agent import room
from sdlora_edge.agent.batching import Batcher, Busy, Limits
from sdlora_edge.agent.held import Unserved
from sdlora_edge.agent.room import Room
from sdlora_edge.device import Device
from sdlora_edge.device.answers import Answered, Asked
from sdlora_edge.errors import InputError, ResourceError, UsageError


@pytest.fixture
def device(store: Path) -> Device:
    return Device.open(store, threads=1)


def test_each_caller_gets_what_it_asked_for(device: Device) -> None:
    image = encoded()
    with Batcher(lambda: device) as batcher:
        several = [
            batcher.submit(image, Asked(top, 1e9 if top == 2 else None)) for top in (1, 2, 9)
        ]
        one, two, all_four = (future.result(60) for future in several)
        assert [len(found.prediction.top) for found in (one, two, all_four)] == [1, 2, 4]
        assert (one.prediction.known, two.prediction.known) == (True, False)
        assert two.prediction.threshold == 1e9
        assert one.features is not None
        assert one.features.dtype == np.float32
        with pytest.raises(InputError):
            batcher.submit(b"no image", Asked()).result(60)
        with pytest.raises(UsageError):
            batcher.submit_all([image] * 65, Asked())


def test_requests_are_computed_together_and_a_lone_one_at_once(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes, goes = device.answer_prepared, [], threading.Event()

    def slow(pixels: list[np.ndarray], asked: Asked, batch: int) -> list[Answered]:
        sizes.append(len(pixels))
        goes.wait(60)
        return real(pixels, asked, batch)  # type: ignore[return-value]

    monkeypatch.setattr(device, "answer_prepared", slow)
    roomy = Room(None, 4, 10**6)
    roomy.batch = 4
    with Batcher(lambda: device, Limits(queue=9, wait=1.0), (), roomy) as batcher:
        first = batcher.submit(encoded(), Asked())
        while not sizes:  # it waits for nobody
            pass
        rest = [batcher.submit(encoded(i), Asked()) for i in range(8)]
        with pytest.raises(Busy):
            batcher.submit(encoded(), Asked())
        assert batcher.waiting == 9
        goes.set()
        for future in (first, *rest):
            future.result(60)
        assert batcher.waiting == 0
    assert sizes[0] == 1
    assert sorted(sizes[1:], reverse=True)[0] == 4
    assert sum(sizes) == 9


def test_what_is_called_after_an_answer_may_fail(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[object, Answered]] = []

    def fails(image: object, answered: Answered) -> None:
        raise ValueError("of a hook")

    image = encoded()
    with caplog.at_level(logging.ERROR), Batcher(lambda: device, None, [fails]) as batcher:
        batcher._on_answer = [fails, lambda *found: told.append(found)]
        found = batcher.submit(image, Asked()).result(60)
    assert told == [(image, found)]
    assert "of a hook" in caplog.text


def test_without_a_model_every_caller_is_told(store: Path) -> None:
    def none() -> Device:
        raise Unserved("no model")

    with Batcher(none) as batcher, pytest.raises(Unserved):
        batcher.submit(encoded(), Asked()).result(60)
    with pytest.raises(Busy):
        batcher.submit(encoded(), Asked())


def test_closing_answers_what_is_admitted(device: Device) -> None:
    batcher = Batcher(lambda: device)
    futures = [batcher.submit(encoded(i), Asked()) for i in range(20)]
    within(60, batcher.close)
    assert all(future.result(0).prediction for future in futures)


def test_batches_grow_while_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100]
    monkeypatch.setattr(room, "peak", lambda: now[0] * room.MB)
    monkeypatch.setattr(room, "MALLOPT", {})
    monkeypatch.setenv(room.ARENA, "0")
    small = Room(150, 8, 64 * room.MB)
    small.opened()
    assert small.batch == 1
    assert small.pixels == 50 * room.MB // 2 // room.DECODED
    now[0] = 110
    small.computed(1)
    assert small.batch == 2
    now[0] = 125
    small.computed(1)  # not a whole batch: it tells nothing
    small.computed(2)
    assert small.batch == 2, "4 images would need 30 MB more, and there are 25"
    small.computed(2)
    assert small.batch == 2
    now[0] = 149
    with pytest.raises(ResourceError, match="--memory-limit is 150"):
        Room(150, 8, 64 * room.MB).opened()


def test_images_that_are_decoded_but_for_their_end_take_no_memory_until_all_are_answered(
    device: Device,
) -> None:
    """A request of 2 MB could hold 16 GB: 64 cut PNGs of one colour."""
    gc.collect()
    gc.disable()
    before = sum(issubclass(type(one), Image.Image) for one in gc.get_objects())
    cut = encoded(size=(300, 300))[:-100]
    try:
        with Batcher(lambda: device) as batcher:
            found = batcher.submit_all([cut] * 9, Asked()).result(60)
            assert sum(issubclass(type(one), Image.Image) for one in gc.get_objects()) <= before + 1
    finally:
        gc.enable()
    assert [type(one) for one in found] == [InputError] * 9
    assert "truncated" in str(found[0])


def test_large_images_are_not_decoded_at_the_same_time(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, now, most = device.prepare, [0], [0]

    def slow(image: bytes, pixels: int) -> np.ndarray:
        size = Image.open(io.BytesIO(image)).size
        now[0] += size[0] * size[1]
        most[0] = max(most[0], now[0])
        time.sleep(0.02)
        now[0] -= size[0] * size[1]
        return real(image, pixels)

    monkeypatch.setattr(device, "prepare", slow)
    little = Room(None, 4, 10**6)
    monkeypatch.setattr(Room, "pixels", property(lambda _: 100_000))
    images = [encoded(n, size=(200, 200 + 300 * (n % 2))) for n in range(8)]
    with Batcher(lambda: device, Limits(decoders=4), (), little) as batcher:
        for one in [batcher.submit(image, Asked()) for image in images]:
            one.result(60)
    assert most[0] == 100_000


def test_answers_that_wait_to_be_told_hold_no_more_memory_than_bodies_may(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes, told = threading.Event(), list[object]()

    def slow(image: object, _: Answered) -> None:
        goes.wait(60)
        told.append(image)

    image = encoded()
    monkeypatch.setattr(Room, "bodies", property(lambda _: 3 * len(image)))
    with Batcher(lambda: device, None, [slow]) as batcher:
        for _ in range(6):
            batcher.submit(image, Asked()).result(60)
        large = image + bytes(9 * len(image))
        goes.set()
        while batcher._to_tell:
            time.sleep(0.01)
        batcher.submit(large, Asked()).result(60)
    assert told == [image] * 3 + [large], "a single one is always told"
    assert batcher.untold == 3

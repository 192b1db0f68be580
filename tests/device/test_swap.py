"""A device without the memory for two models gives up the old one first, and is never left with none."""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from conftest import Fleet, images, inputs, within
from faults.scenarios import wrong_canary

from sdlora_edge.device import Device
from sdlora_edge.device.device import IN_PLACE
from sdlora_edge.device.engines import Outputs
from sdlora_edge.device.gate import Gate, one_blas_thread
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import HealthError, ResourceError, UsageError


class Counting:
    """Counts the models in memory whenever another one is about to be loaded.

    Fails to load where `damaged`.
    """

    def __init__(self, device: Device) -> None:
        self.load, self.models, self.most, self.damaged = device._engine.load, [], 0, False
        self.keep(device._live.loaded)

    def keep(self, loaded: Any) -> Any:
        self.models.append(weakref.ref(loaded.feed["head.weight"]))
        return loaded

    def __call__(self, weights: Mapping[str, np.ndarray]) -> Any:
        self.most = max(self.most, sum(model() is not None for model in self.models))
        if self.damaged:
            raise MemoryError
        return self.keep(self.load(weights))


@pytest.fixture
def counted(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Device, Counting]:
    device = Device.open(store, swap=IN_PLACE)
    counting = Counting(device)
    monkeypatch.setattr(device._engine, "load", counting)
    return device, counting


def test_in_place_no_two_models_are_ever_in_memory(
    fleet: Fleet, tmp_path: Path, counted: tuple[Device, Counting]
) -> None:
    """In updates, roll-backs, what another process did, and updates that fail."""
    device, counting = counted
    seen = [device.logits(inputs(device))]
    for path in fleet.packets:
        device.apply(path)
        seen.append(device.logits(inputs(device)))
    for task in (2, 1, 0):
        device.rollback()
        np.testing.assert_array_equal(device.logits(inputs(device)), seen[task])
    with pytest.raises(HealthError, match="canary"):
        device.apply(wrong_canary(fleet, tmp_path), allow_older=True)
    np.testing.assert_array_equal(device.logits(inputs(device)), seen[0])
    Device.open(device._store.path).apply(fleet.packets[0], allow_older=True)
    assert device.refresh()
    np.testing.assert_array_equal(device.logits(inputs(device)), seen[1])
    assert (len(counting.models), counting.most) == (1 + 3 + 3 + 2 + 1, 0)


def test_what_failed_its_canary_is_given_up_before_what_is_left_is_loaded(
    fleet: Fleet, counted: tuple[Device, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a device that follows another process, to a generation that is not healthy here."""
    device, counting = counted
    other = Device.open(device._store.path)
    for path in fleet.packets:
        other.apply(path)
    outputs = device._engine.outputs

    def unhealthy(loaded: Any, pixels: np.ndarray) -> Outputs:
        found = outputs(loaded, pixels)
        return found._replace(logits=found.logits + (1 if loaded.classes > 6 else 0))

    monkeypatch.setattr(device._engine, "outputs", unhealthy)
    assert device.refresh()
    assert device.status().task == 1
    assert (len(counting.models), counting.most) == (1 + 3, 0)


def test_what_the_engine_fails_to_run_is_given_up_before_the_old_one_is_loaded(
    fleet: Fleet, counted: tuple[Device, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error refers to the calls it came through, and they to what they were called with."""
    device, counting = counted
    before = device.logits(inputs(device))

    def fails(loaded: Any, pixels: np.ndarray) -> Outputs:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(device._engine, "outputs", fails)
        with pytest.raises(ResourceError):
            device.apply(fleet.packets[0])
    assert (len(counting.models), counting.most) == (3, 0)
    np.testing.assert_array_equal(device.logits(inputs(device)), before)


def test_predictors_wait_for_an_update_in_place(
    fleet: Fleet, counted: tuple[Device, Counting]
) -> None:
    """One that is inside keeps its weights; those that come later are answered by the new ones."""
    device, _ = counted
    answers: list[tuple[int, int]] = []
    order: list[str] = []
    asked, released = threading.Event(), threading.Event()
    outputs, first = device._engine.outputs, threading.Event()

    def slow(loaded: Any, pixels: np.ndarray) -> Outputs:
        if not first.is_set():
            first.set()
            asked.set()
            released.wait(10)
            order.append("answered")
        return outputs(loaded, pixels)

    def ask() -> None:
        one = device.predict(images(1), top=20)[0]
        answers.append((one.generation, len(one.top)))

    def update() -> None:
        device.apply(fleet.packets[0])
        order.append("updated")

    device._engine.outputs = slow  # type: ignore[method-assign]
    threads = [
        threading.Thread(target=ask),
        threading.Thread(target=update),
        threading.Thread(target=ask),
    ]
    threads[0].start()
    assert asked.wait(10)
    threads[1].start()
    while not device._gate._closed:  # type: ignore[union-attr]
        pass
    threads[2].start()
    assert device._live.loaded is not None
    released.set()
    for thread in threads:
        thread.join(10)
    assert order == ["answered", "updated"]
    assert answers == [(1, 4), (2, 6)]


@pytest.mark.usefixtures("interruptible")
def test_an_update_interrupted_while_it_waits_lets_the_predictors_in_again(
    fleet: Fleet, counted: tuple[Device, Counting]
) -> None:
    """Ctrl-C while a long prediction is being waited for."""
    device, _ = counted
    asked, released, outputs = threading.Event(), threading.Event(), device._engine.outputs

    def slow(loaded: Any, pixels: np.ndarray) -> Outputs:
        asked.set()
        released.wait(10)
        return outputs(loaded, pixels)

    device._engine.outputs = slow  # type: ignore[method-assign]
    predictor = threading.Thread(target=device.predict, args=(images(1),), daemon=True)
    predictor.start()
    assert asked.wait(10)
    gate = device._gate
    assert gate is not None
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not gate._closed:
            pass
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        device.apply(fleet.packets[0])
    released.set()
    predictor.join(10)
    later = threading.Thread(target=device.predict, args=(images(1),), daemon=True)
    later.start()
    later.join(10)
    assert not later.is_alive()


def test_a_signal_handler_does_not_wait_for_the_thread_it_interrupted(
    fleet: Fleet, counted: tuple[Device, Counting]
) -> None:
    """`refresh` upon SIGHUP, while the same thread predicts."""
    device, _ = counted
    Device.open(device._store.path).apply(fleet.packets[0])
    outputs, refused = device._engine.outputs, []

    def interrupted(loaded: Any, pixels: np.ndarray) -> Outputs:
        with pytest.raises(UsageError, match="during a prediction, in the same thread") as error:
            device.refresh()
        refused.append(error)
        return outputs(loaded, pixels)

    device._engine.outputs = interrupted  # type: ignore[method-assign]
    assert device.predict(images(1))[0].generation == 1
    device._engine.outputs = outputs  # type: ignore[method-assign]
    load = device._engine.load

    def predicting(weights: Mapping[str, np.ndarray]) -> Any:
        with pytest.raises(UsageError, match="during an update"):
            device.predict(images(1))
        return load(weights)

    device._engine.load = predicting  # type: ignore[method-assign]
    assert device.refresh()
    assert (len(refused), device.predict(images(1))[0].generation) == (1, 2)


def closing(gate: Gate) -> threading.Thread:
    """Another thread that waits to close it."""

    def close() -> None:
        with gate.closed():
            pass

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    while not gate._closed:
        pass
    return thread


def test_who_is_inside_may_go_in_again_while_another_thread_closes() -> None:
    """A signal handler that predicts, while its thread does: whoever closes waits for that thread."""
    gate = Gate()

    def nested() -> threading.Thread:
        with gate.inside():
            updater = closing(gate)
            with gate.inside():
                return updater

    updater = within(10, nested)
    updater.join(10)
    assert not updater.is_alive()


def test_a_signal_handler_goes_in_while_its_thread_goes_out() -> None:
    """Between the moment at which its thread is no longer inside, and that at which it tells whoever closes."""
    gate = Gate()

    class Interrupted(list[int]):
        def remove(self, value: int) -> None:
            super().remove(value)
            if len(self) == 0 and not entered:
                entered.append(True)
                with gate.inside():
                    pass

    entered: list[bool] = []
    gate._inside = Interrupted()

    def leave() -> threading.Thread:
        with gate.inside():
            return closing(gate)

    updater = within(10, leave)
    updater.join(10)
    assert (not updater.is_alive(), entered) == (True, [True])


def test_a_signal_handler_comes_while_its_thread_closes() -> None:
    gate = Gate()
    refused = []

    def signalled(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode" and gate._closed and not refused:
            sys.settrace(None)
            with pytest.raises(UsageError, match="during an update"), gate.inside():
                pass
            refused.append(True)
        return signalled

    def close() -> None:
        sys.settrace(signalled)
        with gate.closed():
            sys.settrace(None)

    within(10, close)
    assert refused


def test_a_signal_handler_may_load_a_model_while_its_thread_does() -> None:
    def nested() -> None:
        with one_blas_thread(), one_blas_thread():
            pass

    within(10, nested)


def test_a_device_that_can_load_nothing_says_so_and_recovers(
    fleet: Fleet, counted: tuple[Device, Counting]
) -> None:
    device, counting = counted
    before = device.logits(inputs(device))
    counting.damaged = True
    with pytest.raises(ResourceError):
        device.apply(fleet.packets[0])
    with pytest.raises(HealthError, match="no model is loaded"):
        device.predict(images(1))
    counting.damaged = False
    assert device.refresh()
    np.testing.assert_array_equal(device.logits(inputs(device)), before)
    assert device.apply(fleet.packets[0]).task == 1


def test_another_way_to_swap_is_refused(store: Path) -> None:
    with pytest.raises(
        UsageError, match="swap 'sideways' is unknown: choose double_buffer or in_place"
    ):
        Device.open(store, swap="sideways")


def test_programs_that_serve_nobody_hold_one_model(
    fleet: Fleet, store: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """`device apply`, `rollback` and `watch`: nobody waits for their predictions."""
    opened: list[str] = []
    begin = Device.__init__

    def init(self: Device, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        opened.append(type(self._gate).__name__)

    monkeypatch.setattr(Device, "__init__", init)
    assert cli("device", "apply", fleet.packets[0], "--store", store).code == 0
    assert cli("device", "rollback", "--store", store).code == 0
    Watcher(fleet.packets[0].parent, store, emit=lambda event, fields: None).look(settled=False)
    assert opened == ["Gate"] * 3

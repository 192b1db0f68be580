"""Counts of predictions: each is in one period's reports, whatever happens to the disk or the link."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.simulator import Killed, Restarts, Simulator, Tree
from reported import predicted

from sdlora_edge.errors import ResourceError, StorageError
from sdlora_edge.fleet import tally
from sdlora_edge.fleet.counts import MOST_CLASSES, Counts
from sdlora_edge.fleet.ledger import begin, delivered, preview
from sdlora_edge.fleet.tally import Tally
from sdlora_edge.storage import disk

CLOCK = 1_800_000_000


def count(store: Path, *names: str) -> None:
    with Tally(store) as counter:
        counter.add(map(predicted, names))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "disk" / "store"
    store.mkdir(parents=True)
    return store


def test_predictions_are_counted_by_class(store: Path) -> None:
    with Tally(store) as counter:
        counter.add([predicted("cat", 1.0), predicted("dog", 0.5), predicted("dog", 0.25)])
        counter.add([predicted("cat", 0.05, known=False)])
    found = preview(store, CLOCK).predictions
    assert (found.total, found.unknown, found.confidence_1e4) == (4, 1, 4500)
    assert found.by_class == {"cat": 1, "dog": 2}
    # nothing of a single prediction is on the disk
    assert set(os.listdir(store / "fleet")) == {"tally.json", "fleet.lock"}


def test_a_period_ends_when_a_report_was_delivered(store: Path) -> None:
    count(store, "cat")
    first = begin(store, CLOCK)
    count(store, "cat", "dog")
    second = begin(store, CLOCK + 10)  # the first was not delivered: it holds its counts too
    assert second.number == first.number + 1
    assert second.predictions.since == first.predictions.since
    assert (first.predictions.total, second.predictions.total) == (1, 3)
    delivered(store, first.number)  # too late: the second has taken its place
    assert preview(store, CLOCK + 20).predictions.total == 3
    delivered(store, second.number)
    count(store, "dog")
    third = begin(store, CLOCK + 10)  # the same second, by a clock that stands
    assert (third.number, third.predictions.total) == (second.number + 1, 1)
    assert third.predictions.since > second.predictions.since
    delivered(store, third.number)
    fourth = begin(store, CLOCK - 10_000)  # a clock that was set back
    assert (fourth.predictions.total, fourth.number) == (0, third.number + 1)
    assert fourth.predictions.since > third.predictions.since


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"number":0}', None])
def test_a_lost_ledger_does_not_make_numbers_fall(store: Path, damage: bytes | None) -> None:
    numbers = [begin(store, CLOCK + i).number for i in range(3)]
    assert numbers == [CLOCK, CLOCK + 1, CLOCK + 2]
    path = store / "fleet" / "report.json"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert begin(store, CLOCK + 60).number > numbers[-1]


def test_programs_and_threads_count_in_one_store(store: Path) -> None:
    program = (
        "import sys; from sdlora_edge.fleet.tally import Tally\n"
        "from sdlora_edge.device.answers import Prediction\n"
        "tally = Tally(sys.argv[1])\n"
        "tally.add([Prediction((('cat', 0.5),), 1, True, 1.0, None)] * 5)\n"  # flushed at exit
    )
    others = [subprocess.Popen([sys.executable, "-c", program, store]) for _ in range(2)]
    with Tally(store) as counter:
        threads = [
            threading.Thread(target=lambda: [counter.add([predicted("dog")]) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [other.wait() for other in others] == [0, 0]
    assert preview(store, CLOCK).predictions.by_class == {"cat": 10, "dog": 200}


def test_counts_reach_the_disk_every_thirty_seconds(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(tally.time, "monotonic", lambda: now)
    counter = Tally(store)
    counter.add([predicted("cat")])
    assert preview(store, CLOCK).predictions.total == 0
    now = 31.0
    counter.add([predicted("cat")])
    assert preview(store, CLOCK).predictions.total == 2
    counter.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_fork_does_not_count_twice(store: Path) -> None:
    program = (
        "import os, sys; from sdlora_edge.fleet.tally import Tally\n"
        "from sdlora_edge.device.answers import Prediction\n"
        "one = [Prediction((('cat', 0.5),), 1, True, 1.0, None)]\n"
        "tally = Tally(sys.argv[1]); tally.add(one)\n"
        "if (child := os.fork()): os.waitpid(child, 0); tally.add(one)\n"
        "else: tally.add(one)\n"
    )
    subprocess.run([sys.executable, "-c", program, store], check=True)
    assert preview(store, CLOCK).predictions.total == 3


def test_a_store_that_cannot_be_written_stops_no_program(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    counter = Tally(store)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(disk, "write", refuse)
        counter.add([predicted("cat")])
        counter.flush()
    assert "1 predictions are not counted yet" in caplog.text
    counter.close()
    assert preview(store, CLOCK).predictions.total == 1


def test_many_classes_are_bounded(store: Path) -> None:
    many = Counts.of(predicted(f"class {i}") for i in range(MOST_CLASSES + 50))
    both = many + Counts.of([predicted("class 1049"), predicted("new"), predicted("new")])
    assert len(both.by_class) == MOST_CLASSES
    assert both.by_class["new"] == both.by_class["class 1049"] == 2
    assert sum(both.by_class.values()) + both.other == both.total == MOST_CLASSES + 53


def test_a_confidence_that_is_no_number_counts_as_none() -> None:
    found = Counts.of(
        [predicted("cat", float("nan")), predicted("cat", 1.0), predicted("cat", 1.5)]
    )
    assert (found.total, found.confidence_1e4) == (3, 6667)


class Collector:
    """What a reader of the reports adds up: of the reports of one period, the newest counts."""

    def __init__(self) -> None:
        self.number = 0
        self.periods: dict[int, int] = {}

    def take(self, report: Any) -> None:
        assert report.number > self.number, "a number was given twice"
        self.number = report.number
        self.periods[report.predictions.since] = report.predictions.total

    @property
    def total(self) -> int:
        return sum(self.periods.values())


def live(store: Path, collector: Collector, done: Callable[[str], None]) -> None:
    """Two reports that arrive, one that is lost, and predictions between them."""
    arrives = True
    for i in range(3):
        count(store, "cat", "dog")
        done("counted")
        report = begin(store, CLOCK + i)
        if arrives:
            collector.take(report)
            delivered(store, report.number)
        arrives = not arrives


def test_a_power_cut_at_any_point_loses_and_doubles_nothing(store: Path) -> None:
    """At every point of a device's life and in every way a disk allows; then it restarts and reports."""
    root = store.parent
    (store / "fleet").mkdir()
    (store / "fleet" / "fleet.lock").touch()
    collector, counted = Collector(), 0

    def finished(_: str) -> None:
        nonlocal counted
        counted += 2

    def restart(folder: Path) -> tuple[int, int, int]:
        count(folder / "store", "cat")
        report = begin(folder / "store", CLOCK + 100)
        return report.number, report.predictions.since, report.predictions.total - 1

    cuts: list[tuple[list[Tree], int, dict[int, int], int]] = []
    simulator = Simulator(
        root,
        lambda trees: cuts.append((trees, collector.number, dict(collector.periods), counted)),
    )
    with simulator.installed():
        live(store, collector, finished)
    assert counted == 6
    restarts = Restarts(restart, store.parent.parent)
    for trees, number, periods, sure in cuts:
        for tree in trees:
            found = restarts.outcome(tree)
            assert isinstance(found, tuple), found
            again, since, total = found
            assert again > number
            # The newest report of a period takes the older's place, so these are all there are.
            assert sure <= sum({**periods, since: total}.values()) <= sure + 2, (periods, found)
    assert restarts.count > 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", ["write", "sync", "rename", "unlink"])
def test_a_failing_disk_loses_and_doubles_nothing(
    store: Path, operation: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation in turn fails once; what could not be written is tried again."""
    real = getattr(disk, operation)
    for number in range(1, 60):
        place = store / str(number)
        place.mkdir()
        calls, collector = 0, Collector()

        def failing(*given: Any, number: int = number, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(code, os.strerror(code))
            return real(*given, **named)

        monkeypatch.setattr(disk, operation, failing)
        with Tally(place) as counter:
            for i in range(3):
                counter.add([predicted("cat"), predicted("dog")])
                counter.flush()
                try:
                    report = begin(place, CLOCK + i)
                    collector.take(report)
                    delivered(place, report.number)
                except (StorageError, ResourceError):
                    continue
        failed = calls >= number
        monkeypatch.setattr(disk, operation, real)
        collector.take(begin(place, CLOCK + 9))
        assert collector.total == 6, number
        if not failed:
            break
    else:
        pytest.fail("more operations than expected")


def test_a_killed_program_loses_and_doubles_nothing_that_was_flushed(
    store: Path, tmp_path: Path
) -> None:
    """Killed at each operation in turn, and started again on what it left."""
    for die_at in range(1, 100):
        place = tmp_path / f"kill{die_at}"
        (place / "store" / "fleet").mkdir(parents=True)
        collector, counted, killed = Collector(), 0, False

        def finished(_: str) -> None:
            nonlocal counted
            counted += 2

        simulator = Simulator(place, lambda _: None, die_at)
        with simulator.installed():
            try:
                live(place / "store", collector, finished)
            except Killed:
                killed = True
        collector.take(begin(place / "store", CLOCK + 9))
        assert counted <= collector.total <= counted + 2
        if not killed:
            break
    else:
        pytest.fail("more operations than expected")

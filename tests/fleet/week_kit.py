"""The parts of a whole fleet: `fleet serve` and devices, all of which read one clock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdlora_edge.device.device import Device
from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.follow import Follower, Telling
from sdlora_edge.fleet.identity import Changes, configure
from sdlora_edge.fleet.rollout import share

PROGRAM = """
import sys, time
from pathlib import Path
clock = Path(sys.argv[1])
time.time = lambda: float(clock.read_text())
from sdlora_edge.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""The command line, with the clock of a file."""
PATIENCE = 20.0


class FileClock:
    """Unix seconds that a test sets, and that other processes read from a file."""

    def __init__(self, file: Path, now: float) -> None:
        self.file = file
        self.now = now
        self.forward(0)

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds
        beside = self.file.with_suffix(".new")
        beside.write_text(str(self.now))
        os.replace(beside, self.file)


def until(true: Callable[[], object], what: str) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.02)


class Collector:
    """A collector that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def page(self, path: str = "/") -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310
            return str(answer.read().decode())

    def devices(self) -> dict[str, dict[str, Any]]:
        """What it knows of each device, by name."""
        found = json.loads(self.page("/v1/devices"))["devices"]
        return {device["name"]: device for device in found}


@contextlib.contextmanager
def collector(clock: FileClock, *options: str) -> Iterator[Collector]:
    """`sdlora-edge fleet serve`, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(clock.file), "fleet", "serve", "--port", "0"]
    with _running([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("fleet: "), f"the collector does not start: {first!r}"
        yield Collector(first.split()[1])


@contextlib.contextmanager
def _running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Camera:
    """A device of the fleet: its store, and `device watch --from`, one look at a time."""

    def __init__(self, store: Path, changes: Changes, root: bytes, clock: Callable[[], float]):
        self.store = store
        self.who = configure(store, changes)
        Client(store).trust(root)
        self.events: list[str] = []
        self._telling = Telling(store, every=0.0)
        self._follower = Follower(
            lambda: Client(store, clock=clock),
            60.0,
            emit=lambda event, fields: self.events.append(event),
            tell=self._telling,
        )

    def look(self) -> None:
        """Look at the repository, take what there is, and report."""
        self._follower.look()

    def close(self) -> None:
        self._telling.close()

    @property
    def task(self) -> int:
        return Device.open(self.store).status().task


def configured(store: Path, packet: str, inside: bool) -> None:
    """Give a device an id whose place in the waves of a packet is below 50 %, or is not."""
    while (share(configure(store, Changes()).id, packet) < 5000) != inside:
        shutil.rmtree(store / "fleet")

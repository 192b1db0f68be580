"""A week of a fleet, with real parts: a static web server, `fleet serve`, and four devices.

One device is in the canary group, one is in the first half of the line, one is switched off, and
one is too old. A good packet reaches all that can take it. A bad one stops in the canary group.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Fleet, Result, images
from fleet_kit import Made, made, served
from forge import Draft
from week_kit import Camera, Collector, FileClock, collector, configured, until

from sdlora_edge.device.device import Device
from sdlora_edge.fleet import pacing
from sdlora_edge.fleet.identity import Changes
from sdlora_edge.fleet.overview import find_update
from sdlora_edge.fleet.rollout import PAUSED, RUNNING, Step
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.signing import load_signer

LINE = "line-3"
HOUR = 3600
HALF_A_DAY = 12 * HOUR + 60
ON = "canary", "gate", "old"
"""The devices that are on all the time; `hall` is not."""
Cli = Callable[..., Result]


@dataclass
class Week:
    """All of it. cameras: by name."""

    clock: FileClock
    site: Made
    collector: Collector
    database: str
    cameras: dict[str, Camera]

    def start(self, packet: Path) -> None:
        """What `fleet rollout start` does."""
        target = find_update(self.site.repository.targets(), str(packet))
        pace = pacing.Pace((0, 50, 100), ("canary",), success=50, error=2)
        self.site.repository.pace(
            LINE, lambda plan: pacing.start(plan, target, pace, self.clock()), self.site.online
        )

    def step(self) -> Step:
        """The newest step of the line."""
        return self.site.repository.plan(LINE).steps[-1]

    def report(self, *names: str) -> None:
        """Devices look and report, until the collector knows it."""
        for name in names:
            self.cameras[name].look()

        def reported() -> bool:
            found = self.collector.devices()
            return all(found[name]["last_seen"] == int(self.clock()) for name in names)

        until(reported, f"the collector knows of {', '.join(names)}")

    def look(self, *names: str) -> dict[str, int]:
        """The same. Returns the task of each device."""
        self.report(*names)
        return {name: camera.task for name, camera in self.cameras.items()}

    def days(self, count: int) -> None:
        """Days pass. Every device that is switched on reports twice a day."""
        for _ in range(2 * count):
            self.clock.forward(HALF_A_DAY)
            self.report(*ON)
        self.site.repository.refresh(self.site.online)

    def goes_on_to(self, percent: int) -> None:
        """A day later the driver puts the next wave in force."""
        self.days(1)
        until(lambda: self.step().percent == percent, f"the wave of {percent} %")


@pytest.fixture
def week(fleet: Fleet, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Week]:
    clock = FileClock(tmp_path / "clock", 1_790_000_000.0)
    monkeypatch.setattr(time, "time", clock)
    site = made(tmp_path, clock)
    # the packet of task 1 is older than the repository, and is not in it
    site.repository.publish([fleet.bundle, fleet.packets[1]], site.targets_keys, site.online)
    database = f"sqlite:///{tmp_path}/fleet.db"
    waves = ("--repository", str(site.path), "--online-keys", str(tmp_path / "keys" / "online"))
    with contextlib.ExitStack() as open_parts:
        url = open_parts.enter_context(served(site.path)).url
        options = ("--database", database, "--every", "0.1", *waves)
        found = open_parts.enter_context(collector(clock, *options))
        cameras = {}
        for name in (*ON, "hall"):
            store = tmp_path / name
            device = Device.init(fleet.bundle, store)
            if name != "old":
                device.apply(fleet.packets[0])
            configured(store, sha256(fleet.packets[1].read_bytes()), name == "gate")
            groups = ("canary",) if name == "canary" else ()
            changes = Changes(name, LINE, groups, url, (found.url,))
            cameras[name] = Camera(store, changes, site.root, clock)
            open_parts.callback(cameras[name].close)
            identity = tmp_path / f"{name}.json"
            shown = cli("device", "identity", "--store", store, "--json")
            identity.write_text(shown.out)
            assert cli("fleet", "enroll", identity, "--database", database).code == 0
        yield Week(clock, site, found, database, cameras)


def bad_packet(fleet: Fleet, path: Path) -> Path:
    """The next packet, signed by the right key, whose model does not compute what its canary says."""
    draft = Draft(fleet.packets[2])
    draft.arrays["canary.logits"] = draft.arrays["canary.logits"] + 1
    path.write_bytes(draft.sealed(load_signer(fleet.key)))
    return path


def test_a_good_packet_reaches_the_fleet_and_a_bad_one_stops_by_itself(
    week: Week, fleet: Fleet, tmp_path: Path, cli: Cli
) -> None:
    assert week.look(*ON, "hall") == {"canary": 1, "gate": 1, "hall": 1, "old": 0}

    # the canary group first, then half of the line, then all of it
    week.start(fleet.packets[1])
    assert week.look(*ON) == {"canary": 2, "gate": 1, "hall": 1, "old": 0}
    assert week.step().percent == 0, "a wave lasts a day at least"
    assert "at 0 %" in week.collector.devices()["gate"]["waiting"]
    week.goes_on_to(50)
    assert week.look(*ON) == {"canary": 2, "gate": 2, "hall": 1, "old": 0}
    week.goes_on_to(100)

    # one device is too old, and says why; one was switched off all the time
    assert week.look(*ON) == {"canary": 2, "gate": 2, "hall": 1, "old": 0}
    known = week.collector.devices()
    assert (known["old"]["condition"], known["old"]["code"]) == ("failing", 5)
    assert "flash this device with a newer bundle" in known["old"]["failure"]
    assert known["hall"]["condition"] == "silent"
    assert week.step().status == RUNNING, "a device that is too old does not speak against a packet"
    page = week.collector.page()
    assert "flash this device with a newer bundle" in page
    assert "hall sent no report for" in page

    # it comes back after a week, and catches up
    week.days(5)
    assert week.look("hall")["hall"] == 2
    assert week.collector.devices()["hall"]["condition"] == "fine"

    # a bad packet: signed by the right keys, published, rolled out
    bad = bad_packet(fleet, tmp_path / "bad.sdlora")
    week.site.repository.publish([bad], week.site.targets_keys, week.site.online)
    week.start(bad)
    assert week.look("canary")["canary"] == 2
    until(lambda: week.step().status == PAUSED, "the driver pauses")
    assert week.step().reason == "1 of 1 devices failed (100.0 %, limit 2 %)"

    # nobody else takes it, and all devices serve on
    events = list(week.cameras["gate"].events)
    assert week.look("gate", "hall") == {"canary": 2, "gate": 2, "hall": 2, "old": 0}
    assert week.cameras["gate"].events == events
    for camera in week.cameras.values():
        assert Device.open(camera.store).predict(images(1)[0]).top

    # people see it
    page = week.collector.page()
    for text in ("1 of 1 devices failed", "canary of task 3 failed", "packet revoke"):
        assert text in page, text
    shown = cli("fleet", "devices", "--database", week.database)
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line}
    assert "failing" in lines["canary"]
    assert "waiting" in lines["gate"]
    rows = json.loads(cli("fleet", "devices", "--database", week.database, "--json").out)["devices"]
    (canary,) = (row for row in rows if row["name"] == "canary")
    assert canary["code"] == 6
    gate = week.collector.devices()["gate"]
    assert "the roll-out of task 3 is paused: 1 of 1 devices failed" in gate["waiting"]

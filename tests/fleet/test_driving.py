"""Waves that advance and pause by themselves, in a real repository, from real reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cameras import Camera, digest, predicted
from conftest import Fleet
from fleet_kit import Clock, Made, made

from sdlora_edge.errors import InputError
from sdlora_edge.fleet import pacing
from sdlora_edge.fleet.collector.database import Database
from sdlora_edge.fleet.collector.driver import Pace
from sdlora_edge.fleet.collector.driving import Driver
from sdlora_edge.fleet.collector.inbox import STORED, Inbox
from sdlora_edge.fleet.collector.listening import Service, look
from sdlora_edge.fleet.collector.lookups import Filter, event_rows
from sdlora_edge.fleet.collector.registry import ADVANCED, PROPOSED, STOPPED, enroll
from sdlora_edge.fleet.collector.views import Settings, Views
from sdlora_edge.fleet.rollout import PAUSED, RUNNING, Plan, Step
from sdlora_edge.fleet.sync_state import Failure, Progress
from sdlora_edge.fleet.targets import UPDATE, Target

pytestmark = pytest.mark.long

HOUR = 3600
OLD = digest("old")
ON = "line-3"


class Line:
    """A channel with forty devices, whose roll-out of one packet has begun."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.clock = Clock(time.time())
        self.made: Made = made(folder, self.clock)
        bundle = [fleet.bundle, fleet.packets[0]]
        self.made.repository.publish(bundle, self.made.targets_keys, self.made.online)
        self.target: Target = next(
            t for t in self.made.repository.targets() if t.published.kind == UPDATE
        )
        self.database = Database.open(f"sqlite:///{folder / 'fleet.db'}")
        self.inbox = Inbox(self.database, self.clock)
        self.cameras = [Camera(f"camera {i}") for i in range(40)]
        enroll(self.database, [c.identity for c in self.cameras], self.clock())
        keys = folder / "keys" / "online"
        self.driver = Driver(self.database, self.made.path, keys, Pace(soak=24), self.clock)
        self.hear(state=OLD, task=0, predictions=self.counts(0.03))
        self.clock.now += HOUR
        self.begun = int(self.clock())
        pace = pacing.Pace(waves=(50, 100))
        self.change(lambda plan: pacing.start(plan, self.target, pace, self.clock()))

    def change(self, how: Any) -> None:
        self.made.repository.pace(ON, how, self.made.online)

    def counts(self, rate: float) -> Any:
        return predicted(int(self.clock()), round(100 * rate), cat=100 - round(100 * rate))

    def hear(self, cameras: list[Camera] | None = None, **changes: Any) -> None:
        """A report of each of these cameras, or of all."""
        for camera in self.cameras if cameras is None else cameras:
            sealed = camera.sealed(int(self.clock()), **changes)
            assert self.inbox.take(sealed).kind == STORED

    @property
    def updated(self) -> dict[str, Any]:
        """What devices report that have the packet."""
        return {"state": self.target.published.end, "task": self.target.published.sequence}

    @property
    def step(self) -> Step:
        (step,) = self.made.repository.plan(ON).steps
        return step

    @property
    def inside(self) -> list[Camera]:
        return [c for c in self.cameras if self.step.includes(c.id, ())]

    def kinds(self) -> list[str]:
        return [e.kind for e in event_rows(self.database, Filter(), (ADVANCED, STOPPED, PROPOSED))]


@pytest.fixture
def line(tmp_path: Path, fleet: Fleet) -> Iterator[Line]:
    found = Line(tmp_path, fleet)
    yield found
    found.database.close()


def test_a_good_packet_reaches_everyone_by_itself(line: Line) -> None:
    line.clock.now += HOUR
    line.hear(line.inside, **line.updated)
    line.driver.drive(line.clock())
    assert (line.step.wave, line.kinds()) == (0, []), "it has to soak"
    line.clock.now += 23 * HOUR
    line.hear(line.inside, **line.updated)
    line.driver.drive(line.clock())
    assert (line.step.wave, line.step.status) == (1, RUNNING)
    assert (line.step.changed, line.kinds()) == (int(line.clock()), [ADVANCED])
    line.clock.now += 48 * HOUR
    line.hear(**line.updated)
    line.driver.drive(line.clock())
    assert line.kinds() == [ADVANCED]
    views = Views(line.database, Settings(), line.clock, line.driver.plans)
    (wave,) = views.waves() or ()
    assert (wave.evidence.done, wave.evidence.members) == (40, 40)
    assert wave.evidence.begun == line.begun, "an advance of the driver begins no new step"


def test_a_packet_that_fails_is_stopped_and_a_revocation_is_proposed(line: Line) -> None:
    line.clock.now += HOUR
    now = int(line.clock())
    failure = (Failure(now, 6, "the canary differs by 3.1"),)
    step = Progress(line.target.digest, 50, True)
    line.hear(line.inside[1:], state=OLD, task=0, errors=failure, step=step)
    line.driver.drive(line.clock())
    assert line.step.status == PAUSED
    assert "devices failed" in line.step.reason
    assert sorted(line.kinds()) == sorted([STOPPED, PROPOSED])
    (proposed,) = event_rows(line.database, Filter(channel=ON), (PROPOSED,))
    sequence = line.target.published.sequence
    assert f"packet revoke --bundle BUNDLE --task {sequence} --revision 0" in proposed.command
    assert f"fleet publish revoke-{sequence}-r0.sdlora --repository" in proposed.command
    for _ in range(3):
        line.clock.now += 30 * HOUR
        line.driver.drive(line.clock())
    assert (line.step.status, len(line.kinds())) == (PAUSED, 2), "it says so once, and waits"
    line.change(lambda plan: pacing.resume(plan, line.target.digest, line.clock()))
    line.clock.now += HOUR
    line.hear(line.inside, errors=failure, step=step, state=OLD, task=0)
    line.driver.drive(line.clock())
    assert line.step.status == RUNNING, "a human let it go on in spite of these errors"
    again = (Failure(int(line.clock()), 6, "the canary differs by 3.1"),)
    line.hear(line.inside, errors=again, step=step, state=OLD, task=0)
    line.driver.drive(line.clock())
    assert line.step.status == PAUSED


def test_errors_count_across_an_advance_of_the_driver(line: Line) -> None:
    line.clock.now += 25 * HOUR
    early = Failure(int(line.clock()) - 60, 6, "the canary differs")
    line.hear(line.inside, **line.updated)
    line.driver.drive(line.clock())
    assert line.step.wave == 1
    line.clock.now += HOUR
    step = Progress(line.target.digest, 100, True)
    line.hear(line.cameras[:2], state=OLD, task=0, errors=(early,), step=step)
    line.driver.drive(line.clock())
    assert line.step.status == PAUSED


def test_a_jump_of_the_unknown_rate_stops_a_packet(line: Line) -> None:
    line.clock.now += HOUR
    line.hear(line.inside, **line.updated)
    line.clock.now += HOUR
    line.hear(line.inside, **line.updated, predictions=line.counts(0.19))
    outside = [c for c in line.cameras if c not in line.inside]
    line.hear(outside, state=OLD, task=0, predictions=line.counts(0.03))
    line.driver.drive(line.clock())
    assert line.step.status == PAUSED
    assert "the unknown rate rose by 16.0 points" in line.step.reason


def test_everywhere_more_unknown_images_stop_nothing(line: Line) -> None:
    line.clock.now += HOUR
    line.hear(line.inside, **line.updated)
    line.clock.now += HOUR
    outside = [c for c in line.cameras if c not in line.inside]
    line.hear(line.inside, **line.updated, predictions=line.counts(0.3))
    line.hear(outside, state=OLD, task=0, predictions=line.counts(0.28))
    line.driver.drive(line.clock())
    assert line.step.status == RUNNING


def test_what_a_human_changes_meanwhile_stays(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.clock.now += 25 * HOUR
    line.hear(line.inside, **line.updated)
    read = line.driver._repository.plan

    def late(channel: str) -> Plan:
        """The driver reads the plan, and then a human pauses."""
        monkeypatch.setattr(line.driver._repository, "plan", read)
        plan = read(channel)
        line.change(lambda p: pacing.pause(p, line.target.digest, "lunch", line.clock()))
        return plan

    monkeypatch.setattr(line.driver._repository, "plan", late)
    line.driver.drive(line.clock())
    assert (line.step.status, line.step.reason, line.step.wave) == (PAUSED, "lunch", 0)
    assert line.kinds() == []


def test_without_keys_it_only_shows(line: Line, tmp_path: Path) -> None:
    driver = Driver(line.database, line.made.path, None, Pace(soak=0), line.clock)
    line.clock.now += 25 * HOUR
    line.hear(line.inside, **line.updated)
    driver.drive(line.clock())
    assert line.step.wave == 0
    (plan,) = driver.plans()
    assert plan.channel == ON
    with pytest.raises(InputError, match="fleet init"):
        Driver(line.database, tmp_path / "nothing", None, Pace())


def test_the_regular_work_goes_on_after_a_failure(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(channel: str) -> Plan:
        raise InputError("the plan is damaged")

    service = Service(settings=Settings(silent_after=HOUR))
    monkeypatch.setattr(line.driver._repository, "plan", broken)
    line.clock.now += 25 * HOUR
    look(service, line.database, line.driver, line.clock())
    assert "the plan is damaged" in caplog.text
    assert len(event_rows(line.database, Filter(), ("silent",))) == 40

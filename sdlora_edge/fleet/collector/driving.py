"""Drives waves: looks at the plans regularly, and signs what `driver.decide` says."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import SdloraError
from .. import pacing
from ..keyholders import KeyFolder
from ..online import OnlineKeys
from ..repository import Repository
from ..rollout import RUNNING, Plan, Step
from .database import Database
from .driver import ADVANCE, STAY, Decision, Pace, Rates, decide, has, weigh
from .lookups import DeviceRow, Filter, Tally, device_rows, rates_since
from .registry import ADVANCED, DAY, MIXED, PROPOSED, STOPPED, Event, log_event
from .schema import HOUR
from .views import begun_of

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("sdlora_edge")
BEFORE = 7 * DAY
"""Seconds before a step in which unknown rates are compared with those after it."""
FRESH = 10
"""Seconds for which pages show the plans without reading them again."""


class _Moved(Exception):
    """Somebody else changed the step meanwhile: look again the next time."""


class Driver:
    """Reads the plans of a fleet repository, and paces them if it has the online keys."""

    def __init__(
        self,
        database: Database,
        repository: Path,
        keys: Path | None,
        pace: Pace,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Check that both can be used.

        Args:
            database: Where reports are.
            repository: Folder of the fleet repository.
            keys: Folder of the online keys; None to show the waves only.
            pace: How waves advance.
            clock: Gives Unix seconds to the repository.

        Raises:
            InputError: There is no such repository, or there are no keys.
            TrustError: The repository is not signed by its keys.
        """
        self._database = database
        root = KeyFolder(keys.parent).pinned() if keys else None
        self._repository = Repository.open(repository, clock, root)
        self._online = OnlineKeys.load(keys) if keys else None
        self._pace = pace
        self._known: tuple[float, list[Plan]] = (-FRESH, [])

    def plans(self) -> Sequence[Plan]:
        """The plans of all channels; the last known ones while they cannot be read."""
        read, plans = self._known
        if time.monotonic() - read >= FRESH:
            try:
                plans = [self._repository.plan(name) for name in self._repository.channels()]
            except SdloraError as error:
                log.error("the waves cannot be read: %s", error)
            self._known = time.monotonic(), plans
        return plans

    def drive(self, clock: float) -> None:
        """Look at every running step once.

        clock: Unix seconds.
        """
        if self._online is None:
            return
        for name in self._repository.channels():
            plan = self._repository.plan(name)
            here = device_rows(self._database, Filter(channel=name), clock, None)
            for step in plan.steps:
                if step.status == RUNNING and clock >= step.not_before:
                    self._drive(plan, step, here, clock)

    def _drive(self, plan: Plan, step: Step, here: Sequence[DeviceRow], clock: float) -> None:
        begun = begun_of(self._database, plan, step)
        found = weigh(plan, step, here, begun, clock)
        decision = decide(step, found, self._rates(plan, step, here, begun), self._pace, clock)
        if decision.kind == STAY:
            return
        change = _advanced if decision.kind == ADVANCE else _paused
        try:
            self._sign(plan.channel, step, lambda now: change(now, step, decision, clock))
        except _Moved:
            return
        log.info("channel %s, task %d: %s", plan.channel, step.sequence, decision.reason)
        for event in self._events(plan, step, decision, begun):
            log_event(self._database, event, clock)

    def _sign(self, channel: str, step: Step, change: Callable[[Plan], Plan]) -> None:
        assert self._online is not None

        def unless_moved(now: Plan) -> Plan:
            if step not in now.steps:
                raise _Moved
            return change(now)

        self._repository.pace(channel, unless_moved, self._online)
        self._known = (-FRESH, [])

    def _rates(self, plan: Plan, step: Step, here: Sequence[DeviceRow], begun: int) -> Rates:
        """Unknown rates since the step began, and of the same devices before it."""
        after = rates_since(self._database, plan.channel, begun // HOUR * HOUR, None)
        before = rates_since(self._database, plan.channel, begun - BEFORE, begun // HOUR * HOUR)
        updated = {device.id for device in here if has(plan, step, device)}
        others = {device.id for device in here} - updated
        return Rates(
            # of an updated device only what it predicted with the packet
            _summed(after, updated, lambda task: task >= step.sequence),
            _summed(after, others, lambda task: MIXED < task < step.sequence),
            _summed(before, updated, lambda task: MIXED < task < step.sequence),
            _summed(before, others, lambda task: MIXED < task < step.sequence),
        )

    def _events(self, plan: Plan, step: Step, decision: Decision, begun: int) -> list[Event]:
        if decision.kind == ADVANCE:
            percent = step.waves[step.wave + 1]
            text = f"task {step.sequence} to {percent} %: {decision.reason}"
            return [Event(ADVANCED, text, plan.channel, packet=step.packet, begun=begun)]
        text = f"task {step.sequence} at {step.percent} %: {decision.reason}"
        proposal = (
            f"to take task {step.sequence} back on the devices that have it, sign and publish a "
            "revocation; to go on all the same, resume it"
        )
        return [
            Event(STOPPED, text, plan.channel, packet=step.packet),
            Event(
                PROPOSED, proposal, plan.channel, packet=step.packet, command=self._command(step)
            ),
        ]

    def _command(self, step: Step) -> str:
        """What a human with the offline keys runs to take a packet back."""
        revision = next(
            (t.published.revision for t in self._repository.targets() if t.digest == step.packet), 0
        )
        file = f"revoke-{step.sequence}-r{revision}.sdlora"
        place = shlex.quote(str(self._repository.path))
        return (
            f"sdlora-edge packet revoke --bundle BUNDLE --task {step.sequence} "
            f"--revision {revision} --key NAME --out {file}\n"
            f"sdlora-edge fleet publish {file} --repository {place}"
        )


def _advanced(plan: Plan, step: Step, decision: Decision, clock: float) -> Plan:
    return pacing.advance(plan, step.packet, clock)


def _paused(plan: Plan, step: Step, decision: Decision, clock: float) -> Plan:
    return pacing.pause(plan, step.packet, decision.reason, clock)


def _summed(
    found: Mapping[tuple[str, int], Tally], devices: set[str], wanted: Callable[[int], bool]
) -> Tally:
    return sum(
        (t for (device, task), t in found.items() if device in devices and wanted(task)), Tally()
    )

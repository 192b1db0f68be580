"""What the dashboard and the API show, put together from the database and the roll-out plans."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...results import Result
from ..rollout import RUNNING, Plan, Step
from .database import Database
from .driver import Evidence, weigh
from .lookups import (
    CONDITIONS,
    FAILING,
    LOST,
    Choices,
    DeviceRow,
    EventRow,
    Filter,
    Span,
    changes,
    choices,
    class_mix,
    device_rows,
    event_rows,
    newest_report,
    unknown_rates,
)
from .plots import Plot, Stack, mix_stack, unknown_plot
from .registry import ADVANCED, BACK, PROPOSED, SILENT, STOPPED

PAGE = 100
"""Devices on a page."""
MOST_SHOWN = 50
"""Rows of each other table."""
NEWS = ADVANCED, STOPPED, PROPOSED, SILENT, BACK
"""Kinds of events on the first page. Its charts show the updates."""
PERIODS = 1, 7, 30, 90
"""Days that the charts can show."""


@dataclass(frozen=True)
class Settings:
    """What counts as silent and as a jump.

    Attributes:
        silent_after: Seconds; None: see `registry.find_silent`.
        unknown_jump: Percentage points.
        report_url: Where devices send reports, for the empty page.
    """

    silent_after: int | None = None
    unknown_jump: float = 10


@dataclass(frozen=True)
class Wave(Result):
    """A step of a channel's roll-out, and how its devices stand to it.

    Attributes:
        step: The step.
        evidence: Of the wave in force.
    """

    channel: str
    step: Step
    evidence: Evidence


@dataclass(frozen=True)
class TaskShare:
    """How many devices serve a task."""

    label: str
    task: int | None
    devices: int


@dataclass(frozen=True)
class FailureRow:
    """A reason, and the devices that fail for it."""

    code: int | None
    reason: str
    devices: tuple[DeviceRow, ...]


@dataclass(frozen=True)
class FleetView:
    """The first page."""

    chosen: Filter
    days: int
    choices: Choices
    devices: tuple[DeviceRow, ...]
    conditions: dict[str, int]
    tasks: tuple[TaskShare, ...]
    waves: tuple[Wave, ...] | None
    failures: tuple[FailureRow, ...]
    silent: tuple[DeviceRow, ...]
    unknown: Plot | None
    mix: Stack | None
    events: tuple[EventRow, ...]

    @property
    def rate(self) -> float | None:
        """The unknown rate of the last day."""
        total = sum(device.total for device in self.devices)
        return sum(device.unknown for device in self.devices) / total if total else None


@dataclass(frozen=True)
class DeviceView:
    """The page of one device. report: its newest one as JSON has it; None if there is none."""

    device: DeviceRow
    days: int
    report: dict[str, Any] | None
    unknown: Plot | None
    mix: Stack | None
    events: tuple[EventRow, ...]


class Views:
    """Makes them.

    Attributes:
        plans: Returns the roll-out plans; None if this collector knows no repository.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        clock: Callable[[], float],
        plans: Callable[[], Sequence[Plan]] | None = None,
    ) -> None:
        self.database = database
        self.settings = settings
        self.clock = clock
        self.plans = plans

    def rows(self, chosen: Filter) -> list[DeviceRow]:
        """The devices that a filter leaves."""
        return device_rows(self.database, chosen, self.clock(), self.settings.silent_after)

    def fleet(self, chosen: Filter, days: int) -> FleetView:
        """The first page."""
        found = self.rows(chosen)
        counted = Counter(device.condition for device in found)
        unknown, mix = self._charts(chosen, days)
        return FleetView(
            chosen=chosen,
            days=days,
            choices=choices(self.database),
            devices=tuple(found),
            conditions={name: counted[name] for name in CONDITIONS},
            tasks=_tasks(found),
            waves=self.waves(chosen.channel),
            failures=_failures(found),
            silent=tuple(
                sorted((d for d in found if d.condition == LOST), key=lambda d: d.last_seen or 0)
            ),
            unknown=unknown,
            mix=mix,
            events=tuple(event_rows(self.database, chosen, NEWS, most=12)),
        )

    def device(self, name: str, days: int) -> DeviceView | None:
        """The page of a device; None if it is not enrolled."""
        chosen = Filter(device=name)
        if not (found := self.rows(chosen)):
            return None
        unknown, mix = self._charts(chosen, days)
        report = newest_report(self.database, name)
        return DeviceView(
            device=found[0],
            days=days,
            report=json.loads(report) if report else None,
            unknown=unknown,
            mix=mix,
            events=tuple(event_rows(self.database, chosen, most=MOST_SHOWN)),
        )

    def waves(self, channel: str = "") -> tuple[Wave, ...] | None:
        """The steps of all channels, or of one; None if this collector knows no repository."""
        if self.plans is None:
            return None
        rows = self.rows(Filter())
        return tuple(
            Wave(plan.channel, step, self._evidence(plan, step, rows))
            for plan in self.plans()
            if channel in ("", plan.channel)
            for step in reversed(plan.steps)
        )

    def _evidence(self, plan: Plan, step: Step, rows: Sequence[DeviceRow]) -> Evidence:
        begun, shown = begun_of(self.database, plan, step), step
        if step.status != RUNNING:  # the time of the stop says nothing about its devices
            begun, shown = 0, replace(step, status=RUNNING, changed=0)
        here = [row for row in rows if row.channel == plan.channel]
        return weigh(plan.with_step(shown), shown, here, begun, self.clock())

    def _charts(self, chosen: Filter, days: int) -> tuple[Plot | None, Stack | None]:
        span = Span.of_days(days, self.clock())
        rates = unknown_rates(self.database, chosen, span)
        found = changes(self.database, chosen, span.start)
        return (
            unknown_plot(rates, found, span, self.settings.unknown_jump),
            mix_stack(class_mix(self.database, chosen, span), span),
        )


def begun_of(database: Database, plan: Plan, step: Step) -> int:
    """When a step last started or was resumed: its `changed`, unless the driver advanced it."""
    for one in event_rows(database, Filter(channel=plan.channel), (ADVANCED,)):
        if one.packet == step.packet and one.time == step.changed:
            return one.begun
    return step.changed


def _tasks(found: Sequence[DeviceRow]) -> tuple[TaskShare, ...]:
    counted = Counter((d.task, d.task_name) for d in found)
    shares = [
        TaskShare("no report yet" if task is None else f"{task}: {name}", task, count)
        for (task, name), count in counted.items()
    ]
    return tuple(sorted(shares, key=lambda s: -1 if s.task is None else s.task, reverse=True))


def _failures(found: Sequence[DeviceRow]) -> tuple[FailureRow, ...]:
    by_reason: dict[tuple[int | None, str], list[DeviceRow]] = {}
    for device in found:
        if device.condition == FAILING or device.failure:
            by_reason.setdefault((device.code, _reason(device)), []).append(device)
    rows = [FailureRow(code, reason, tuple(d)) for (code, reason), d in by_reason.items()]
    return tuple(sorted(rows, key=lambda row: -len(row.devices)))


def _reason(device: DeviceRow) -> str:
    if device.failure:
        return device.failure
    if device.damage:
        return f"{device.damage} damaged file{'s' if device.damage > 1 else ''}"
    return "it serves no model"

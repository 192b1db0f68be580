"""What pages, the API, the metrics and the driver ask the database."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select

from ...formats.canonical import dump_json
from ...results import Result
from ..sync_state import as_errors, as_step
from .database import Database
from .registry import DAY, UPDATED, patience, read_list
from .schema import HOUR, counts, devices, events, hours, reports

LASTING = 3, 4, 5, 6
"""Exit codes that repeat until the device gets another packet. Others go by themselves."""
FINE, WAITING, FAILING, LOST, NEVER = "fine", "waiting", "failing", "silent", "never reported"
CONDITIONS = FINE, WAITING, FAILING, LOST, NEVER


@dataclass(frozen=True)
class Filter:
    """Which devices are meant: those of a channel, a group, a task, or one device."""

    channel: str = ""
    group: str = ""
    task: int | None = None
    device: str = ""


@dataclass(frozen=True)
class DeviceRow(Result):
    """What is known of a device.

    Attributes:
        condition: One of CONDITIONS.
        failure: The newest error, if it still stands; else empty. code: its exit code.
        unknown, total: Predictions of the last day.
        last_seen: Unix seconds by the collector's clock; None if it never reported.
        online: As the broker says; None if it says nothing.
        included: Whether the device sees itself in the wave in force; None if it does not say.
    """

    id: str
    name: str
    channel: str
    groups: tuple[str, ...]
    condition: str
    task: int | None
    task_name: str
    revision: int
    state: str
    lineage: str
    packets: int
    last_seen: int | None
    online: bool | None
    waiting: str
    failure: str
    code: int | None
    damage: int
    unknown: int
    total: int
    packet: str
    included: bool | None
    errors: tuple[tuple[int, int], ...]

    @property
    def unknown_rate(self) -> float | None:
        """Share of unknown images of the last day."""
        return self.unknown / self.total if self.total else None


@dataclass(frozen=True)
class EventRow(Result):
    """An event, with its time in Unix seconds."""

    id: int
    time: int
    kind: str
    channel: str
    device: str
    packet: str
    task: int | None
    message: str
    command: str
    begun: int


def device_rows(
    database: Database, chosen: Filter, clock: float, silent_after: int | None
) -> list[DeviceRow]:
    """The devices that a filter leaves, by name."""
    now = int(clock)
    with database.begin() as connection:
        query = select(devices).where(*_chosen(chosen)).order_by(devices.c.name, devices.c.id)
        rows = connection.execute(query).mappings().all()
        day = _rates_by_device(connection, now - DAY)
    return [_row(dict(row), day.get(row["id"], (0, 0)), now, silent_after) for row in rows]


def _chosen(chosen: Filter) -> list[Any]:
    found: list[Any] = []
    if chosen.device:
        found.append(devices.c.id == chosen.device)
    if chosen.channel:
        found.append(devices.c.channel == chosen.channel)
    if chosen.task is not None:
        found.append(devices.c.task == chosen.task)
    if chosen.group:
        found.append(devices.c.groups.contains(dump_json(chosen.group).decode(), autoescape=True))
    return found


def _rates_by_device(connection: Connection, since: int) -> dict[str, tuple[int, int]]:
    query = (
        select(hours.c.device, func.sum(hours.c.total), func.sum(hours.c.unknown))
        .where(hours.c.hour >= since)
        .group_by(hours.c.device)
    )
    return {
        device: (int(total), int(unknown)) for device, total, unknown in connection.execute(query)
    }


def _row(
    row: Mapping[str, Any], day: tuple[int, int], now: int, silent_after: int | None
) -> DeviceRow:
    report = json.loads(row["report"]) if row["report"] else {}
    step = as_step(report.get("step"))
    failing = _stands(row)
    return DeviceRow(
        id=row["id"],
        name=row["name"],
        channel=row["channel"],
        groups=tuple(read_list(row["groups"])),
        condition=_condition(row, failing, now, silent_after),
        task=row["task"],
        task_name=row["task_name"] or "",
        revision=row["revision"] or 0,
        state=row["state"] or "",
        lineage=row["lineage"] or "",
        packets=row["packets"] or 0,
        last_seen=row["last_seen"],
        online=row["online"],
        waiting=row["waiting"] or "",
        failure=row["error_message"] if failing else "",
        code=row["error_code"] if failing else None,
        damage=row["damage"] or 0,
        unknown=day[1],
        total=day[0],
        packet=step.packet if step else "",
        included=step.included if step else None,
        errors=tuple((e.time, e.code) for e in as_errors(report.get("errors", []))),
    )


def _stands(row: Mapping[str, Any]) -> bool:
    """Whether the newest error of a device still stands: nothing it did since undoes it."""
    if row["error_time"] is None or row["error_time"] < row["state_since"]:
        return False
    return row["error_code"] in LASTING or row["error_time"] > row["time"] - DAY


def _condition(row: Mapping[str, Any], failing: bool, now: int, silent_after: int | None) -> str:
    if row["last_seen"] is None:
        return NEVER
    if now - row["last_seen"] > patience(row["gap"], silent_after):
        return LOST
    if failing or row["damage"] or not row["state"]:
        return FAILING
    return WAITING if row["waiting"] else FINE


@dataclass(frozen=True)
class Choices:
    """What there is to filter by."""

    channels: tuple[str, ...]
    groups: tuple[str, ...]
    tasks: tuple[tuple[int, str], ...]


def choices(database: Database) -> Choices:
    """The channels, groups and tasks of all devices."""
    with database.begin() as connection:
        rows = connection.execute(
            select(
                devices.c.channel, devices.c.groups, devices.c.task, devices.c.task_name
            ).distinct()
        ).all()
    return Choices(
        tuple(sorted({row.channel for row in rows})),
        tuple(sorted({group for row in rows for group in read_list(row.groups)})),
        tuple(sorted({r.task: r.task_name or "" for r in rows if r.task is not None}.items())),
    )


@dataclass(frozen=True)
class Tally:
    """Predictions of a stretch of time."""

    total: int = 0
    unknown: int = 0

    @property
    def rate(self) -> float | None:
        """Share of unknown images."""
        return self.unknown / self.total if self.total else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.unknown + other.unknown)


@dataclass(frozen=True)
class Span:
    """Times that a chart shows: from `start` on, in steps of `width` seconds."""

    start: int
    width: int
    count: int

    @classmethod
    def of_days(cls, days: int, clock: float) -> Span:
        """The last days, in at most 60 steps of whole hours."""
        width = next(h for h in (1, 3, 6, 12, 24, 72) if days * 24 <= 60 * h or h == 72) * HOUR
        count = days * DAY // width
        return cls((int(clock) // width + 1 - count) * width, width, count)

    def place(self, time: int) -> int:
        """The step that a time lies in."""
        return (time - self.start) // self.width


def unknown_rates(database: Database, chosen: Filter, span: Span) -> dict[int, dict[int, Tally]]:
    """Predictions by task, and by step of a span."""
    step = (hours.c.hour - span.start) // span.width
    query = (
        select(hours.c.task, step, func.sum(hours.c.total), func.sum(hours.c.unknown))
        .where(hours.c.hour >= span.start)
        .group_by(hours.c.task, step)
    )
    found: dict[int, dict[int, Tally]] = {}
    with database.begin() as connection:
        for task, at, total, unknown in connection.execute(_joined(query, hours, chosen)):
            found.setdefault(task, {})[int(at)] = Tally(int(total), int(unknown))
    return found


def class_mix(database: Database, chosen: Filter, span: Span) -> dict[str, dict[int, int]]:
    """Predictions by class, and by step of a span. An empty name stands for rare classes."""
    step = (counts.c.hour - span.start) // span.width
    query = (
        select(counts.c.name, step, func.sum(counts.c.count))
        .where(counts.c.hour >= span.start)
        .group_by(counts.c.name, step)
    )
    found: dict[str, dict[int, int]] = {}
    with database.begin() as connection:
        for name, at, count in connection.execute(_joined(query, counts, chosen)):
            found.setdefault(name, {})[int(at)] = int(count)
    return found


def _joined(query: Select[Any], table: Any, chosen: Filter) -> Select[Any]:
    """A query of counts for some devices only; their task now does not matter for the past."""
    wanted = _chosen(Filter(chosen.channel, chosen.group, None, chosen.device))
    return query.where(table.c.device.in_(select(devices.c.id).where(*wanted))) if wanted else query


def event_rows(
    database: Database, chosen: Filter, kinds: Sequence[str] = (), most: int = 200
) -> list[EventRow]:
    """The newest events of a channel or device, the newest first."""
    wanted: list[Any] = [events.c.kind.in_(kinds)] if kinds else []
    if chosen.device:
        wanted.append(events.c.device == chosen.device)
    if chosen.channel:
        wanted.append(events.c.channel == chosen.channel)
    query = (
        select(events).where(*wanted).order_by(events.c.time.desc(), events.c.id.desc()).limit(most)
    )
    with database.begin() as connection:
        return [EventRow(**row) for row in connection.execute(query).mappings()]


@dataclass(frozen=True)
class Change:
    """Devices that got to a task: how many, and when the first did."""

    task: int
    devices: int
    time: int


def changes(database: Database, chosen: Filter, since: int) -> list[Change]:
    """Which tasks devices got to since a time, in the order of time."""
    wanted = _chosen(Filter(chosen.channel, chosen.group, None, chosen.device))
    query = (
        select(events.c.task, func.count(func.distinct(events.c.device)), func.min(events.c.time))
        .join(devices, devices.c.id == events.c.device)
        .where(events.c.kind == UPDATED, events.c.time >= since, *wanted)
        .group_by(events.c.task)
    )
    with database.begin() as connection:
        rows = connection.execute(query).all()
    return sorted((Change(*row) for row in rows), key=lambda one: one.time)


def newest_report(database: Database, device: str) -> str | None:
    """The newest report of a device as JSON; None if there is none."""
    with database.begin() as connection:
        query = select(devices.c.report).where(devices.c.id == device)
        return connection.execute(query).scalar_one_or_none()


def report_count(database: Database, device: str) -> int:
    """Number of a device's reports that are kept."""
    with database.begin() as connection:
        query = select(func.count()).select_from(reports).where(reports.c.device == device)
        return int(connection.execute(query).scalar_one())


def rates_since(
    database: Database, channel: str, since: int, until: int | None
) -> dict[tuple[str, int], Tally]:
    """Predictions of a channel by device and task, from hours since a time and until another."""
    wanted = [hours.c.hour >= since, *([hours.c.hour < until] if until is not None else [])]
    query = (
        select(hours.c.device, hours.c.task, func.sum(hours.c.total), func.sum(hours.c.unknown))
        .join(devices, devices.c.id == hours.c.device)
        .where(devices.c.channel == channel, *wanted)
        .group_by(hours.c.device, hours.c.task)
    )
    with database.begin() as connection:
        rows = connection.execute(query).all()
    return {
        (device, task): Tally(int(total), int(unknown)) for device, task, total, unknown in rows
    }

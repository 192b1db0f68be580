"""What changes in the database: devices are enrolled, reports arrive, events happen, rows age."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from ...errors import UsageError
from ...formats.canonical import dump_json
from ...results import Result
from ..identity import Identity
from ..report import Predictions, Report
from .database import Database, put
from .schema import HOUR, counts, devices, events, hours, reports

DAY = 24 * HOUR
AHEAD = 300
"""Seconds by which a device's clock may be ahead of ours before its time is replaced by ours."""
LONGEST_GAP = 30 * DAY
ONLINE, BACK, SILENT, UPDATED = "online", "back", "silent", "updated"
ADVANCED, STOPPED, PROPOSED = "advanced", "paused", "revocation proposed"
"""Kinds of events."""


MIXED = -1
"""The task of predictions of a period in which the task changed."""


class StaleReport(Exception):
    """The report is older than the newest one that is known, or equal to it."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        task: That the device got to.
        command: For a human to run.
        begun: See `driver.Evidence`.
    """

    kind: str
    message: str
    channel: str = ""
    device: str = ""
    packet: str = ""
    task: int | None = None
    command: str = ""
    begun: int = 0


@dataclass(frozen=True)
class Enrolled(Result):
    """Ids of the devices that were new, changed and known already."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    known: tuple[str, ...]


def enroll(
    database: Database, found: Iterable[Identity], clock: float, replace: bool = False
) -> Enrolled:
    """Accept reports of these devices from now on.

    Args:
        database: Where they are kept.
        found: As `device identity --json` prints them.
        clock: Unix seconds.
        replace: Give a device that has a new key this new key.

    Raises:
        UsageError: A device has another key than before. Nothing is changed then.
    """
    sorted_: dict[str, list[str]] = {"added": [], "changed": [], "known": []}
    with database.begin() as connection:
        for one in found:
            sorted_[_enroll(connection, one, int(clock), replace)].append(one.id)
    return Enrolled(**{kind: tuple(ids) for kind, ids in sorted_.items()})


def _enroll(connection: Connection, one: Identity, clock: int, replace: bool) -> str:
    row = connection.execute(select(devices).where(devices.c.id == one.id)).mappings().first()
    facts = {
        "name": storable(one.name),
        "channel": storable(one.channel),
        "groups": dump_json(list(one.groups)).decode(),
        "public": one.public,
    }
    if row is None:
        connection.execute(insert(devices).values(id=one.id, enrolled=clock, **facts))
        return "added"
    if row["public"] == one.public:
        return "known"  # its newest report knows better which name, channel and groups it has
    if not replace:
        raise UsageError(
            f"device {one.id} ({one.name}) is enrolled with another key: if it was really "
            "installed anew, enroll it with --replace"
        )
    connection.execute(update(devices).where(devices.c.id == one.id).values(**facts, number=0))
    connection.execute(delete(reports).where(reports.c.device == one.id))  # numbers begin anew
    return "changed"


def key_of(database: Database, device: str) -> str | None:
    """The public key of a device; None if it is not enrolled."""
    with database.begin() as connection:
        return connection.execute(
            select(devices.c.public).where(devices.c.id == device)
        ).scalar_one_or_none()


def store(database: Database, report: Report, clock: float) -> None:
    """Keep a report whose signature is good.

    Args:
        database: Where it is kept.
        report: It counts even if it was sent long ago: what it counted has happened.
        clock: Unix seconds.

    Raises:
        StaleReport: A report with this number or a higher one was stored before.
    """
    now = int(clock)
    with database.begin() as connection:
        old = connection.execute(select(devices).where(devices.c.id == report.device)).mappings()
        before = dict(old.one())
        values = _facts(report, before, now)
        # the number is compared by the database: two reports may arrive at once
        newer = (devices.c.id == report.device) & (devices.c.number < report.number)
        if not connection.execute(update(devices).where(newer).values(**values)).rowcount:
            raise StaleReport(f"report {report.number} of device {report.device} is not new")
        row = {"device": report.device, "number": report.number, "received": now}
        connection.execute(insert(reports).values(**row, report=values["report"]))
        _count(connection, report, before, moment(report, now))
        _tell(connection, report, before, now)


def moment(report: Report, now: int) -> int:
    """When a report was made: by its device's clock, or by ours if that one is impossible."""
    wrong = report.clock_behind or not now - LONGEST_GAP <= report.time <= now + AHEAD
    return now if wrong else report.time


def _facts(report: Report, before: Mapping[str, Any], now: int) -> dict[str, Any]:
    newest = max(report.errors, key=lambda one: one.time, default=None)
    moved = before["state"] != report.state
    return {
        "name": storable(report.name),
        "channel": storable(report.channel),
        "groups": dump_json(list(report.groups)).decode(),
        "number": report.number,
        "last_seen": now,
        "gap": _gap(before, now),
        "time": report.time,
        "lineage": report.lineage,
        "bundle": report.bundle,
        "state": report.state,
        "state_since": report.time if moved else before["state_since"],
        "task": report.task,
        "task_name": storable(report.task_name),
        "revision": report.revision,
        "generation": report.generation,
        "packets": report.packets,
        "trust_version": report.trust_version,
        "waiting": storable(report.waiting),
        "error_time": newest and newest.time,
        "error_code": newest and newest.code,
        "error_message": newest and storable(newest.message),
        "damage": report.damage,
        "metadata_expired": report.metadata_expired,
        "clock_behind": report.clock_behind,
        "report": dump_json(report.to_dict()).decode(),
    }


def _gap(before: Mapping[str, Any], now: int) -> int | None:
    """The usual time between two reports: a long silence changes it only little."""
    if before["last_seen"] is None:
        return None
    new: int = max(1, min(now - before["last_seen"], LONGEST_GAP))
    old: int | None = before["gap"]
    return new if old is None else (3 * old + min(new, 2 * old)) // 4


def _count(connection: Connection, report: Report, before: Mapping[str, Any], time: int) -> None:
    """Add what a report counted. It takes the place of an earlier report of the same period.

    If the state changed within the period, nobody knows which state predicted what.
    """
    made = report.predictions
    hour, task = time // HOUR * HOUR, report.task
    if before["report"] is not None:
        past = json.loads(before["report"])["predictions"]
        if before["state"] != report.state:
            task = MIXED
        if past["since"] == made.since:
            place = (report.device, before["counted_hour"], before["counted_task"])
            _add(connection, place, Predictions(**past), -1)
            task = task if before["counted_task"] != MIXED else MIXED
    _add(connection, (report.device, hour, task), made, 1)
    connection.execute(
        update(devices)
        .where(devices.c.id == report.device)
        .values(counted_hour=hour, counted_task=task)
    )


def _add(connection: Connection, place: tuple[str, int, int], made: Predictions, sign: int) -> None:
    """Add counts, or with sign -1 take them back. place: device, hour, task."""
    if not made.total:
        return
    device, hour, task = place
    key: dict[str, Any] = {"device": device, "hour": hour}
    total = {"total": sign * made.total, "unknown": sign * made.unknown}
    put(connection, hours, {**key, "task": task}, total)
    by_class: Counter[str] = Counter({"": made.other})
    for name, count in made.by_class.items():
        by_class[storable(name)] += count
    for name, count in by_class.items():
        if count:
            put(connection, counts, {**key, "name": name}, {"count": sign * count})


def _tell(connection: Connection, report: Report, before: Mapping[str, Any], now: int) -> None:
    about: dict[str, Any] = {"channel": storable(report.channel), "device": report.device}
    if before["silent"]:
        connection.execute(
            update(devices).where(devices.c.id == report.device).values(silent=False)
        )
        add_event(connection, Event(BACK, f"{storable(report.name)} reports again", **about), now)
    if before["state"] not in (None, report.state):
        text = (
            f"{storable(report.name)} went from task {before['task']} to task {report.task} "
            f"({storable(report.task_name)})"
        )
        add_event(connection, Event(UPDATED, text, **about, task=report.task), moment(report, now))


def add_event(connection: Connection, one: Event, time: int) -> None:
    """Keep an event."""
    connection.execute(insert(events).values(time=time, **vars(one)))


def log_event(database: Database, one: Event, clock: float) -> None:
    """Keep an event, in a transaction of its own."""
    with database.begin() as connection:
        add_event(connection, one, int(clock))


def set_online(database: Database, device: str, online: bool) -> bool:
    """Keep what the broker says of a device; False if the device is not enrolled."""
    with database.begin() as connection:
        statement = update(devices).where(devices.c.id == device).values(online=online)
        return bool(connection.execute(statement).rowcount)


def find_silent(database: Database, clock: float, after: int | None) -> list[str]:
    """Note which devices went silent since the last call, and return their ids.

    after: Seconds without a report. None stands for a day, or three times the device's usual time
        between two reports if that is longer.
    """
    now = int(clock)
    with database.begin() as connection:
        rows = connection.execute(
            select(devices).where(devices.c.silent.is_(False), devices.c.last_seen < now)
        ).mappings()
        gone = [row for row in rows if now - row["last_seen"] > patience(row["gap"], after)]
        for row in gone:
            connection.execute(update(devices).where(devices.c.id == row["id"]).values(silent=True))
            text = f"{row['name']} sent no report for {(now - row['last_seen']) // HOUR} hours"
            add_event(connection, Event(SILENT, text, row["channel"], row["id"]), now)
    return [row["id"] for row in gone]


def patience(gap: int | None, after: int | None) -> int:
    """Seconds after which a device without a report counts as silent."""
    return max(DAY, 3 * (gap or 0)) if after is None else after


def prune(database: Database, clock: float, keep_days: int) -> int:
    """Remove reports, counts and events that are too old. Devices stay. Returns the number."""
    oldest = int(clock) - keep_days * DAY
    with database.begin() as connection:
        return sum(
            connection.execute(delete(table).where(column < oldest)).rowcount
            for table, column in (
                (reports, reports.c.received),
                (hours, hours.c.hour),
                (counts, counts.c.hour),
                (events, events.c.time),
            )
        )


def storable(text: str) -> str:
    """Text as a database takes it: without NUL, and without halves of a character pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def read_list(text: str) -> list[str]:
    """A list that was kept as JSON."""
    found: list[str] = json.loads(text)
    return found

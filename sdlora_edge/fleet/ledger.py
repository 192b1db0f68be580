"""Numbers reports, and sees that no prediction is lost or counted twice.

    STORE/fleet/tally.json     what programs have counted since the last report: a batch
    STORE/fleet/report.json    number of the last report, and the counts of the current period

A period ends when a report of it was delivered. Until then, each report of the period holds all of
its counts, so that a newer one can take the older's place: a device that is offline keeps only the
newest. `since` tells periods apart. A report whose delivery was not confirmed may have arrived; the
next one has the same `since`, so its reader replaces the counts and does not add them.

One write takes a batch, and gives the report its number. The batch's file is removed after that. If
the power is cut between the two, the batch's name in `report.json` says that it is counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UNWRITTEN, InputError
from ..formats.canonical import LARGEST, dump_json, parse_exact_json
from ..formats.fields import either, one_of, record, whole
from ..results import Result
from ..storage import atomic, disk
from .counts import COUNTS, Counts
from .identity import folder_of, locked
from .report import Counted, Predictions
from .rollout import LATEST

log = logging.getLogger(__name__)
TALLY, LEDGER = "tally.json", "report.json"
TALLY_FORMAT, LEDGER_FORMAT = "sdlora-edge/tally/1", "sdlora-edge/ledger/1"


@dataclass(frozen=True)
class Batch(Result):
    """What programs have counted since the last report.

    Attributes:
        name: 16 hexadecimal digits, by chance.
        since: Unix seconds when it was begun.
        counts: The counts.
    """

    name: str
    since: int
    counts: Counts

    @classmethod
    def begun(cls, clock: int) -> Batch:
        """An empty one. clock: Unix seconds."""
        return cls(os.urandom(8).hex(), clock, Counts())


@dataclass(frozen=True)
class Ledger(Result):
    """Where a device's reports stand.

    Attributes:
        number: Of the last report.
        time: When it was made, in Unix seconds.
        since: When the current period began, in Unix seconds.
        counts: Of the current period.
        taken: Name of the last batch that is in `counts`; empty if there was none.
    """

    number: int
    time: int
    since: int
    counts: Counts
    taken: str

    def counted(self) -> Counted:
        """Number and predictions of the last report."""
        n = self.counts
        return Counted(
            self.number,
            Predictions(self.since, n.total, n.unknown, n.confidence_1e4, n.by_class, n.other),
        )


def _name(value: Any) -> None:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{16}", value) is None:
        raise ValueError(f"{value!r} is not the name of a batch")


_TIME = whole(0, LATEST)
_BATCH = record({"format": one_of(TALLY_FORMAT), "name": _name, "since": _TIME, "counts": COUNTS})
_LEDGER = record(
    {
        "format": one_of(LEDGER_FORMAT),
        "number": whole(0, LARGEST),
        "time": _TIME,
        "since": _TIME,
        "counts": COUNTS,
        "taken": either(one_of(""), _name),
    }
)


def preview(store: Path, clock: int) -> Counted:
    """What `begin` would return. Nothing is written."""
    return _next(store, clock).counted()


def begin(store: Path, clock: int) -> Counted:
    """Give the next report its number and its counts.

    clock: Unix seconds.

    Raises:
        StorageError, ResourceError: The ledger cannot be written.
        UsageError: Another process holds the lock of the fleet's folder.
    """
    with locked(store):
        new = _next(store, clock)
        _write(store, new)
        with contextlib.suppress(OSError):  # its name is in the ledger, so it counts no more
            atomic.remove(folder_of(store) / TALLY)
        return new.counted()


def delivered(store: Path, number: int) -> None:
    """End the period: a report arrived wherever it was sent.

    If a newer report was made meanwhile, the period goes on: the newer one holds its counts.

    Raises:
        StorageError, ResourceError: The ledger cannot be written. The period goes on.
        UsageError: Another process holds the lock of the fleet's folder.
    """
    with locked(store):
        old = _read_ledger(store)
        if old is None or old.number != number:
            return
        # It rises even if the clock does not: equal ones would be the same period.
        since = min(max(old.time, old.since + 1), LATEST)
        _write(store, replace(old, since=since, counts=Counts()))


def read_batch(store: Path) -> Batch | None:
    """What was counted since the last report; None if nothing was.

    A damaged file counts nothing.
    """
    value = _read(folder_of(store) / TALLY) or {}
    try:
        _BATCH(value)
        batch = Batch(value["name"], value["since"], Counts(**value["counts"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    old = _read_ledger(store)
    return None if old and old.taken == batch.name else batch


def write_batch(store: Path, batch: Batch) -> None:
    """Keep what was counted. Call it under the lock.

    Raises:
        StorageError, ResourceError: It is not written.
    """
    path = folder_of(store) / TALLY
    try:
        atomic.write(path, dump_json({"format": TALLY_FORMAT, **batch.to_dict()}), like=store)
    except UNWRITTEN:
        # The rename may have been done, and what failed came after it. Then every process sees
        # these counts, and adding them once more would count them twice.
        if read_batch(store) != batch:
            raise


def _next(store: Path, clock: int) -> Ledger:
    clock = min(max(0, clock), LATEST)
    batch, old = read_batch(store), _read_ledger(store)
    if old is None:
        # Numbers must rise even if a ledger was lost, so they begin at the clock. Reports are
        # rarer than one a second.
        old = Ledger(max(0, clock - 1), clock, batch.since if batch else clock, Counts(), "")
    return Ledger(
        number=old.number + 1,
        time=clock,
        since=old.since,
        counts=old.counts + batch.counts if batch else old.counts,
        taken=batch.name if batch else old.taken,
    )


def _read_ledger(store: Path) -> Ledger | None:
    path = folder_of(store) / LEDGER
    value = _read(path)
    if value is None:
        return None
    try:
        _LEDGER(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): reports are numbered from the clock", path, error)
        return None
    value.pop("format")
    return Ledger(**value | {"counts": Counts(**value["counts"])})


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON in a file; None if there is none, and {} if it is damaged.

    Raises InputError if the disk does not answer.
    """
    with atomic.reading(path):
        if disk.size(path) is None:
            return None
    data = atomic.read(path)  # a disk that does not answer is an error, not a damaged file
    try:
        return parse_exact_json(data, str(path))
    except InputError:
        return {}


def _write(store: Path, ledger: Ledger) -> None:
    data = dump_json({"format": LEDGER_FORMAT, **ledger.to_dict()})
    atomic.write(folder_of(store) / LEDGER, data, like=store)

"""Reports when there is something to say: after a change of the device, and regularly.

A heartbeat is asked often and is cheap: the model is loaded only after a generation record has
changed.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from ..device.device import Device
from ..device.store import Store
from ..errors import SdloraError, UsageError
from ..results import Result, Status
from . import ledger
from .identity import Identity, device_signer, identity
from .mqtt_link import Options
from .report import Report, seal, surroundings, unseal
from .reporting import Reporter, Sent, compose, last_sync
from .tally import reports

EVERY = 3600.0
"""seconds, unless the caller says more"""


def serving(store: Path) -> Status | SdloraError:
    """The status of a device; or the error because of which it serves nothing."""
    try:
        return Device.open(store).status()
    except SdloraError as error:
        return error


def dry_run(store: Path) -> Report:
    """What the next report would say, cut to the bytes that it may have. Nothing is written.

    Raises:
        InputError: The device has no identity, or its key cannot be read.
    """
    who = identity(store)
    counted = ledger.preview(store, surroundings(store).time)
    sealed = seal(compose(store, who, serving(store), counted), device_signer(store))
    return unseal(sealed, {who.id: who.public})


def report_once(store: Path, to: str | None, options: Options) -> Sent:
    """Report to the configured places, or to another one.

    Raises:
        UsageError: No place is configured, and none is given.
    """
    who = identity(store)
    places = who.report_to if to is None else (to,)
    if not places:
        raise UsageError(
            "this device reports nowhere: name a place with --to, or run sdlora-edge device "
            f"configure --store {store} --report-to URL"
        )
    with Reporter(store, who, options, stays=False) as reporter:
        return reporter.report_to(places, serving(store))


class Heartbeat:
    """Reports of a process that follows a repository. Call it after each look; it never raises.

    A store that is not configured to report is left alone. A changed identity counts at once.

    Args:
        store: The device's directory.
        options: Of the connections.
        every: Seconds between two reports of a device on which nothing changes.
    """

    def __init__(self, store: Path, options: Options | None = None, every: float = EVERY) -> None:
        self._store, self._options, self._every = store, options, every
        self._reporter: Reporter | None = None
        self._who: Identity | None = None
        self._records: object = None
        self._status: Status | SdloraError | None = None
        self._told: tuple[object, Result | None] | None = None
        self._next = 0.0

    def __call__(self) -> Sent | None:
        """Report if the device has changed, or an hour has passed."""
        if not reports(self._store):
            self.close()
            return None
        reporter = self._current()
        records = Store(self._store).records()
        if self._status is None or records != self._records:
            self._status, self._records = serving(self._store), records
        sync = last_sync(self._store)
        facts = records, sync
        if facts == self._told and time.monotonic() < self._next:
            return None
        sent = reporter.report(self._status)
        if sent is not None and not sent.refused:
            self._told, self._next = facts, time.monotonic() + self._every
        return sent

    def close(self) -> None:
        """Say that the device is offline, and end the connections."""
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = self._who = None

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _current(self) -> Reporter:
        """The reporter of the identity as it is now."""
        who = identity(self._store)
        if self._reporter is None or who != self._who:
            self.close()
            self._reporter, self._who = Reporter(self._store, who, self._options), who
            self._told = None
        return self._reporter

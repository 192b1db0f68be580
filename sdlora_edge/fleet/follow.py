"""`device watch --from URL`: follows a fleet repository until it is stopped.

Each look is one `Client.sync`. Looks are spread in time, so that a fleet does not ask all at once.
After an error the next look is later, up to an hour; the device serves meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..device.device import IN_PLACE, Device
from ..device.store import Store
from ..device.watch.events import Emit, Events, notify, now, to_stderr
from ..errors import SdloraError, UsageError
from ..results import Status
from ..storage import atomic
from .client import Client, Synced
from .identity import Identity, identity
from .mqtt_link import Options
from .reporting import Reporter

SHORTEST, LONGEST = 1.0, 86_400.0
"""bounds of the seconds between two looks"""
LONGEST_WAIT = 3600.0
"""seconds between two looks while they fail"""
SPREAD = 0.2
"""A wait is longer or shorter by at most this share."""
MakeClient = Callable[[], Client]
Tell = Callable[["Synced | None"], object]


class Follower:
    """One store and one repository.

    Args:
        client: Makes a client for each look, so that a changed identity counts from the next one.
        interval: Seconds between two looks.
        status: A JSON file to keep for monitoring.
        emit: Gets each event.
        tell: Called after each look with what it did, or None after an error: such as `Telling`.
    """

    def __init__(
        self,
        client: MakeClient,
        interval: float,
        status: Path | None = None,
        emit: Emit = to_stderr,
        tell: Tell | None = None,
    ) -> None:
        if not SHORTEST <= interval <= LONGEST:
            raise UsageError(
                f"an interval of {interval:g} s: give seconds between {SHORTEST:g} and {LONGEST:g}"
            )
        self._client, self._interval, self._status = client, interval, status
        self._events, self._tell = Events(emit), tell
        self._troubles, self._trouble, self._asked = 0, "", 0.0
        self._stopped = False
        # a queue, because a signal handler that sets an Event would wait for the Event's lock
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Make `run` return after the look that is under way. Signal handlers may call it."""
        self._stopped = True
        self._wake.put(None)

    def wake(self) -> None:
        """Make `run` look now. Signal handlers may call it."""
        self._wake.put(None)

    def run(self) -> None:
        """Look again and again until `stop`."""
        self._events.tell("started", {"interval": self._interval})
        while not self._stopped:
            self.look()
            notify("READY=1\nWATCHDOG=1")
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=self.wait_seconds())
        notify("STOPPING=1")
        self._events.tell("stopped", {})

    def look(self) -> Synced | None:
        """Look once; None after an error, which becomes an event."""
        try:
            done = self._client().sync()
        except Exception as error:  # the next look may go better
            self._note(str(error) if isinstance(error, SdloraError) else repr(error), error)
            self._write({"error": self._trouble})
            self._report(None)
            return None
        self._report(done)
        if self._trouble:
            self._events.tell("recovered", {"from": self._trouble})
        self._troubles, self._trouble, self._asked = 0, "", 0.0
        for failure in done.failures:
            self._events.tell("refused", failure.to_dict())
        if done.applied:
            self._events.tell("applied", {"packets": done.applied, "task": done.task})
        self._write(done.to_dict())
        return done

    def wait_seconds(self) -> float:
        """Seconds until the next look: never fewer than the server asks for."""
        longest = max(self._interval, LONGEST_WAIT)
        wait = min(self._interval * 2.0 ** min(self._troubles, 30), longest)
        spread = random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311
        return max(wait * spread, self._asked * (1 + abs(spread - 1)))

    def _report(self, done: Synced | None) -> None:
        if self._tell is not None:
            try:
                self._tell(done)
            except Exception as error:  # a report that is not sent stops nothing
                self._events.tell("unreported", {"error": str(error)})

    def _note(self, text: str, error: Exception) -> None:
        self._troubles += 1
        self._asked = min(getattr(error, "retry_after", None) or 0.0, LONGEST)
        if text != self._trouble:  # a lasting trouble is told once
            self._trouble = text
            code = getattr(error, "exit_code", 1)
            self._events.tell("trouble", {"error": text, "exit_code": code})

    def _write(self, facts: dict[str, Any]) -> None:
        if self._status is not None:
            data = json.dumps({"time": now(), "running": not self._stopped, **facts}, indent=1)
            try:
                atomic.write(self._status, data.encode() + b"\n")
            except SdloraError as error:
                self._events.tell("status", {"error": str(error)})


class Telling:
    """Reports of a device that follows a repository: after each change, and regularly.

    Args:
        store: The device's directory.
        every: Seconds between two reports if nothing changes.
        options: How to reach the places. None: as the environment says.
        status: Where the device stands, if this process has opened the store. None opens it.
    """

    def __init__(
        self,
        store: Path,
        every: float = 3600.0,
        options: Options | None = None,
        status: Callable[[], Status] | None = None,
    ) -> None:
        self._store, self._every, self._options = store, every, options
        self._opened = status or (lambda: Device.open(store, swap=IN_PLACE).status())
        self._told = -math.inf
        self._who: Identity | None = None
        self._reporter: Reporter | None = None
        self._standing: tuple[int, Status | SdloraError] | None = None

    def __call__(self, done: Synced | None) -> None:
        """Send a report if one is due."""
        who = identity(self._store)
        if who != self._who:
            self.close()
            self._who, self._told = who, -math.inf
            self._reporter = Reporter(self._store, who, self._options) if who.report_to else None
            if self._reporter:
                self._reporter.connect()
        changed = (done is not None and bool(done.applied or done.failures)) or self._has_moved()
        due = changed or time.monotonic() - self._told >= self._every
        if self._reporter is not None and due:
            sent = self._reporter.report(self._status())
            if sent is not None and sent.delivered:
                self._told = time.monotonic()

    def close(self) -> None:
        """Say goodbye to the brokers."""
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None

    def _has_moved(self) -> bool:
        """Whether the store has changed since the last report, whoever changed it."""
        with contextlib.suppress(SdloraError):
            counter = Store(self._store).current().counter
            return self._standing is not None and self._standing[0] != counter
        return False

    def _status(self) -> Status | SdloraError:
        """The device's status. The model is opened only if the store has changed."""
        try:
            counter = Store(self._store).current().counter
            if self._standing is None or self._standing[0] != counter:
                self._standing = counter, self._opened()
            return self._standing[1]
        except SdloraError as error:
            return error


@contextlib.contextmanager
def stopped_by_signals(follower: Follower) -> Iterator[None]:
    """SIGTERM and Ctrl-C stop a follower inside this block. Raises UsageError in another thread."""
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("signals are taken: call this in the main thread, or use Follower.run()")
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda *_: follower.stop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

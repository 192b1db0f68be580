"""`device watch --from URL`: follows a fleet repository until it is stopped.

Each look is one `Client.sync`. Looks are spread in time, so that a fleet does not ask all at once.
After an error the next look is later, up to an hour; the device serves meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import queue
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..device.watch.events import Emit, Events, notify, now, to_stderr
from ..errors import SdloraError, UsageError
from ..storage import atomic
from .client import Client, Synced

SHORTEST, LONGEST = 1.0, 86_400.0
"""bounds of the seconds between two looks"""
LONGEST_WAIT = 3600.0
"""seconds between two looks while they fail"""
SPREAD = 0.2
"""A wait is longer or shorter by at most this share."""
MakeClient = Callable[[], Client]
Tell = Callable[[], object]


class Follower:
    """One store and one repository.

    Args:
        client: Makes a client for each look, so that a changed identity counts from the next one.
        interval: Seconds between two looks.
        status: A JSON file to keep for monitoring.
        emit: Gets each event.
        tell: Called after each look: sends a report if one is due (`heartbeat`).
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
        self._troubles, self._trouble = 0, ""
        self._stopped = False
        # a queue, because a signal handler that sets an Event would wait for the Event's lock
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Make `run` return after the look that is under way. Signal handlers may call it."""
        self._stopped = True
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
            self._report()
            return None
        self._report()
        if self._trouble:
            self._events.tell("recovered", {"from": self._trouble})
        self._troubles, self._trouble = 0, ""
        for failure in done.failures:
            self._events.tell("refused", failure.to_dict())
        if done.applied:
            self._events.tell("applied", {"packets": done.applied, "task": done.task})
        self._write(done.to_dict())
        return done

    def wait_seconds(self) -> float:
        """Seconds until the next look."""
        longest = max(self._interval, LONGEST_WAIT)
        wait = min(self._interval * 2.0 ** min(self._troubles, 30), longest)
        return wait * random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311

    def _report(self) -> None:
        if self._tell is not None:
            try:
                self._tell()
            except Exception as error:  # a report that is not sent stops nothing
                self._events.tell("unreported", {"error": str(error)})

    def _note(self, text: str, error: Exception) -> None:
        self._troubles += 1
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

"""What a watcher tells: one JSON line for each event.

Telling never fails, never waits for long, and never floods a log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

AT_ONCE, PAUSE = 100, 10.0
"""how many events of files are told at once, and the seconds after which one more may follow"""
PATIENCE = 1.0
"""seconds to wait for a slow reader of stderr; then the line is lost, and the watcher goes on"""
LAST = 1500
"""characters of a traceback that are told: its end says what happened"""
NOTIFY = "NOTIFY_SOCKET"
Emit = Callable[[str, dict[str, Any]], None]


def now() -> str:
    """The time in UTC, as ISO 8601 with seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def to_stderr(event: str, fields: dict[str, Any]) -> None:
    """One JSON line on stderr. It is lost if stderr is full, closed, or a pipe without a reader."""
    _write(lambda: _line({"time": now(), "event": event, **fields}))


def text_to_stderr(event: str, fields: dict[str, Any]) -> None:
    """As `to_stderr`, for people: the time, the event, and NAME=VALUE for each field."""
    words = (f"{name}={json.dumps(value)}" for name, value in fields.items())
    _write(lambda: " ".join((now(), event, *words))[: select.PIPE_BUF - 1] + "\n")


def _write(made: Callable[[], str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr and _takes_a_line():
            line = made()
            try:
                descriptor = sys.stderr.fileno()
            except (OSError, ValueError):  # it is not a file
                print(line, file=sys.stderr, end="", flush=True)
            else:
                os.write(descriptor, line.encode("ascii"))


def _line(fields: dict[str, Any]) -> str:
    """JSON of at most PIPE_BUF bytes: the longest values are cut."""
    while len(line := json.dumps(fields) + "\n") > select.PIPE_BUF:
        longest = max(fields, key=lambda key: len(json.dumps(fields[key])))
        text = str(fields[longest]).removesuffix("...")
        fields = {**fields, longest: text[: len(text) * 3 // 4] + "..."}
    return line


def _takes_a_line() -> bool:
    ready = select.poll()
    try:
        # of a pipe, POLLOUT promises room for PIPE_BUF bytes and no more: hence the bound in _line
        ready.register(sys.stderr.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is not a file
        return True
    return bool(ready.poll(1000 * PATIENCE))


class JsonLog(logging.Handler):
    """Warnings of the library, as events. tell: gets each."""

    def __init__(self, tell: Emit = to_stderr) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            text = "".join(traceback.format_exception(*record.exc_info))
            fields["traceback"] = text[-LAST:]
        self._tell("log", fields)


class Events:
    """Hands events to `emit` and ignores its errors: an update is in force before it is told."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self._left, self._since = float(AT_ONCE), time.monotonic()
        self._untold: Counter[str] = Counter()

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):
            self.emit(event, fields)

    def tell_of_file(self, event: str, fields: dict[str, Any]) -> None:
        """An event of one file. Beyond the bound, events are only counted."""
        if self._may(reserve=1):
            self.tell(event, fields)
        else:
            self._untold[event] += 1

    def sum_up(self) -> None:
        """Tell how many events of each kind were not told."""
        if self._untold and self._may():
            self.tell("more", dict(self._untold))
            self._untold.clear()

    def _may(self, reserve: int = 0) -> bool:
        clock = time.monotonic()
        self._left, self._since = min(AT_ONCE, self._left + (clock - self._since) / PAUSE), clock
        if self._left < 1 + reserve:
            return False
        self._left -= 1
        return True


def notify(message: str, address: str | None = None) -> None:
    """Tell systemd, if it has started this process (sd_notify: one datagram).

    address: In place of the one in the environment.
    """
    if address := os.environ.get(NOTIFY, "") if address is None else address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.setblocking(False)  # a full queue must not stop the watcher
            to.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)

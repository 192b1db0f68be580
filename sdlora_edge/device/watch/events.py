"""What a watcher tells: one JSON line for each event. To tell never fails, never waits for long, and has a bound."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

AT_ONCE, PAUSE = 100, 10.0
"""events of files that are told at once, and the seconds after which there may be one more"""
PATIENCE = 1.0
"""seconds to wait for whoever reads stderr: after that the line is lost, and the watcher goes on"""
Emit = Callable[[str, dict[str, Any]], None]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def to_stderr(event: str, fields: dict[str, Any]) -> None:
    """One JSON line on stderr; it is lost if stderr is full, closed, or a pipe that nobody reads from."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr and _takes_a_line():
            line = _line({"time": now(), "event": event, **fields})
            try:
                descriptor = sys.stderr.fileno()
            except (OSError, ValueError):  # it is no file
                print(line, file=sys.stderr, end="", flush=True)
            else:
                os.write(descriptor, line.encode("ascii"))


def _line(fields: dict[str, Any]) -> str:
    """JSON of at most PIPE_BUF bytes: the longest values are cut short."""
    while len(line := json.dumps(fields) + "\n") > select.PIPE_BUF:
        longest = max(fields, key=lambda key: len(json.dumps(fields[key])))
        text = str(fields[longest]).removesuffix("...")
        fields = {**fields, longest: text[: len(text) * 3 // 4] + "..."}
    return line


def _takes_a_line() -> bool:
    ready = select.poll()
    try:
        ready.register(
            sys.stderr.fileno(), select.POLLOUT
        )  # of a pipe: it has room for PIPE_BUF bytes, and no more
    except (OSError, ValueError):  # it is no file
        return True
    return bool(ready.poll(1000 * PATIENCE))


class JsonLog(logging.Handler):
    """Warnings of the library, as events."""

    def emit(self, record: logging.LogRecord) -> None:
        to_stderr("log", {"level": record.levelname.lower(), "message": record.getMessage()})


class Events:
    """Passes events on to `emit`, whose errors are nobody's: an update is committed before it is told."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self._left, self._since = float(AT_ONCE), time.monotonic()
        self._untold: Counter[str] = Counter()

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):
            self.emit(event, fields)

    def tell_of_file(self, event: str, fields: dict[str, Any]) -> None:
        """Of one file, of which there may be very many: those beyond the bound are only counted."""
        if self._may(reserve=1):
            self.tell(event, fields)
        else:
            self._untold[event] += 1

    def sum_up(self) -> None:
        """An event that says how many of each kind were not told."""
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


def notify(message: str) -> None:
    """Tell systemd, where it has started this process (sd_notify: one datagram)."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.setblocking(False)  # nobody is waited for
            to.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)

"""HTTP of which no client can take all connections: who is too slow loses his.

uvicorn closes a connection that is idle between two requests, and no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

OWED = 30.0
"""seconds that a client has to send a whole request, and to take what is sent to it"""
REFUSED = 100
"""connections beyond `limit_concurrency` that get 503; others are closed at once"""
QUIET = 60.0
"""seconds in which a warning that clients cause is logged once"""


class HurryingProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for whatever the client owes."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        most = self.limit_concurrency
        if most is not None and len(self.connections) > most + REFUSED:
            transport.abort()
        else:
            self._hurry()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.flow.write_paused:
            self._hurry()
        else:
            self._forget()

    def pause_writing(self) -> None:
        """Called by asyncio if the client does not take what is sent to it."""
        super().pause_writing()
        self._hurry()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        super().resume_writing()
        self._forget()

    def timeout_keep_alive_handler(self) -> None:
        """Called by uvicorn if no next request comes."""
        super().timeout_keep_alive_handler()
        self._hurry()  # it closes only once the client has taken all

    def _hurry(self) -> None:
        """Close in OWED seconds. What comes in pieces does not put it off."""
        if self._limit is None:
            self._limit = self.loop.call_later(OWED, self.transport.abort)

    def _forget(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


class Seldom(logging.Filter):
    """Passes each warning once in QUIET seconds: clients must not fill a log."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged."""
        if record.levelno > logging.WARNING:
            return True
        clock, text = time.monotonic(), str(record.msg)
        if clock - self._last.get(text, -QUIET) < QUIET:
            return False
        self._last[text] = clock
        return True


SELDOM = Seldom()

"""What reaches the terminal: no text that came out of a file makes a terminal or a log do anything.

All output of a command goes through `Escaping`. Only our own modules go past it, with `raw`, to
draw colours, tables and the line of a running stage; each escapes with `printable` what it did not
write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import printable

if TYPE_CHECKING:
    from rich.console import Console

_PROGRESS = re.compile(r"[\r\n]*(\x1b\[A)*")
"""How a progress bar moves, in writes of their own."""

ERASE = "\r\x1b[K"
"""Return to the start of the line and empty it."""

lock = threading.RLock()
"""Held by whoever writes: a line of text never mixes with the line of a running stage."""


class Escaping:
    """A stream that passes on only what can be shown, line ends, and the moves of a progress bar.

    Attributes:
        stream: The stream behind it.
        in_line: Whether the last text did not end its line.
        drawn: Whether the line of a running stage is shown; text replaces it.
    """

    in_line = drawn = False

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        shown = text
        if not _PROGRESS.fullmatch(text):
            start = text[: text.startswith("\r")]
            shown = start + "\n".join(map(printable, text[len(start) :].split("\n")))
        encoding = self.stream.encoding or "utf-8"
        with lock:
            make_room()
            self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
            Escaping.in_line = not shown.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Log(Escaping):
    """A stream that drops what it cannot write: no command fails because its log is full."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


class OneLine(logging.Formatter):
    """One line for each record, whatever its message holds. What is no news gets no label."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno != logging.INFO:
            line = f"{record.levelname.lower()}: {line}"
        return printable(line)


def raw(stream: Any) -> TextIO:
    """The stream behind `Escaping`, for text that we made or escaped ourselves."""
    found: TextIO = getattr(stream, "stream", stream)
    return found


def make_room() -> None:
    """Remove the line of a running stage. Call it with the lock held, before you write."""
    if Escaping.drawn:
        Escaping.drawn = False
        with contextlib.suppress(OSError, ValueError):
            raw(sys.stderr).write(ERASE)
            raw(sys.stderr).flush()


def fancy(stream: Any) -> bool:
    """Whether a stream is a terminal that shows colours, tables and a line that changes."""
    return (
        stream.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        and str(stream.encoding).lower().replace("-", "") == "utf8"
    )


def console(stream: Any) -> Console:
    """Where rich draws, past `Escaping`: no markup or highlighting, and NO_COLOR is respected."""
    from rich.console import Console

    make_room()
    return Console(file=raw(stream), markup=False, highlight=False, emoji=False)


@contextlib.contextmanager
def unescaped() -> Iterator[None]:
    """What is printed in this block is our own: help texts with their colours."""
    make_room()
    with contextlib.redirect_stdout(raw(sys.stdout)):
        yield


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """All output of a command goes through here."""
    # A parent may have closed our standard streams: no file of ours may get one of their numbers.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    out = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    log = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    Escaping.in_line = Escaping.drawn = False
    with contextlib.redirect_stdout(Escaping(out)), contextlib.redirect_stderr(Log(log)):
        yield
    _let_go(log)


def _let_go(log: TextIO) -> None:
    """Drop what the log could not take: otherwise Python would fail for it when it ends."""
    try:
        log.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), log.fileno())

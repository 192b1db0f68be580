"""Whatever a command prints, by whatever way: no text that came out of a file makes a terminal or a log do anything."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import printable

_PROGRESS = re.compile(r"[\r\n]*(\x1b\[A)*")
"""how a progress bar moves, in writes of their own"""


class Escaping:
    """A text stream that passes on nothing but what can be shown, line ends, and a progress bar's return to the line's begin."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if not _PROGRESS.fullmatch(text):
            start = text[: text.startswith("\r")]
            text = start + "\n".join(map(printable, text[len(start) :].split("\n")))
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Log(Escaping):
    """One that loses what it cannot write, for a full disk or a reader that is gone: a command does not fail for its log."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


class OneLine(logging.Formatter):
    """One line for each record, whatever its message holds."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """All output of a command goes through here."""
    while (
        descriptor := os.open(os.devnull, os.O_RDWR)
    ) <= 2:  # closed by whoever started it: no file of ours may get its number
        pass
    os.close(descriptor)
    out, log = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    with contextlib.redirect_stdout(Escaping(out)), contextlib.redirect_stderr(Log(log)):
        yield
    _let_go(log)


def _let_go(log: TextIO) -> None:
    """What the log could not take is lost: else Python would fail for it at its end."""
    try:
        log.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), log.fileno())

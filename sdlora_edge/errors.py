"""Every error this package raises on purpose, in one tree.

The number is the exit code of the command line.

    SdloraError                   1   base class, never raised; exit code 1 means a bug of ours
    ├── UsageError                2   the call is wrong: unknown option value, missing argument
    ├── InputError                3   a file or folder is missing, unreadable or corrupt
    │   ├── LimitError            3   a file, image or number exceeds its limit
    │   └── StorageError          3   a file cannot be written: disk full, read-only, failing
    ├── TrustError                4   too few trusted signatures, a replay, or a revoked task
    ├── NotForThisDevice          5   a genuine packet, but of another lineage, or out of order
    ├── HealthError               6   canary or parity check failed; the old state stays in force
    │   └── DivergedError         6   training diverged: numbers not finite; earlier tasks are kept
    ├── NothingToDo               7   the command is right, but there is nothing to do
    └── ResourceError             8   memory or disk space ran out; no file was judged: try again
        └── LinkError             8   a server or a broker cannot be reached: try again

A message names the offending thing first and ends with what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MESSAGE_LIMIT = 1000
"""Characters. So a hostile file cannot flood a log through a message."""


def printable(text: str) -> str:
    """The text on one line, safe for a terminal.

    Characters that a terminal would obey, or cannot show, are written as in JSON (\\n, \\u001b).
    """
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    )


class SdloraError(Exception):
    """Root of the tree. A command that raises it ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            _shortened(printable(_shortened(message)))
        )  # printable makes up to twelve characters of one

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"message": str(self), "exit_code": self.exit_code}


def _shortened(text: str) -> str:
    half = MESSAGE_LIMIT // 2 - 3
    return text if len(text) <= MESSAGE_LIMIT else f"{text[:half]} ... {text[-half:]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of a file before the errors that this block raises about its content."""
    try:
        yield
    except SdloraError as error:
        if str(error).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error


class UsageError(SdloraError):
    """The call is wrong."""

    exit_code = 2


class InputError(SdloraError):
    """A file or folder is missing, unreadable or damaged."""

    exit_code = 3


class LimitError(InputError):
    """A file, image or number exceeds its limit."""


class StorageError(InputError):
    """A file cannot be written."""


class TrustError(SdloraError):
    """A packet has too few trusted signatures, is a replay, or is of a revoked task."""

    exit_code = 4


class NotForThisDevice(SdloraError):
    """A genuine packet is of another lineage, or out of order."""

    exit_code = 5


class HealthError(SdloraError):
    """A canary or parity check failed. The old state stays in force."""

    exit_code = 6


class DivergedError(HealthError):
    """Training left the finite numbers. The earlier tasks are kept."""


class NothingToDo(SdloraError):
    """The call is right, but there is nothing to do."""

    exit_code = 7


class ResourceError(SdloraError):
    """Memory or disk space ran out. No file was judged."""

    exit_code = 8


class LinkError(ResourceError):
    """A server or a broker cannot be reached, or answers with an error.

    Attributes:
        retry_after: Seconds that the server asks to wait; None if it does not.
    """

    retry_after: float | None = None


UNWRITTEN = (StorageError, ResourceError)
"""Raised if a file cannot be written. They say nothing about its content."""

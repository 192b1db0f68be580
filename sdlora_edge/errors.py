"""Every error this package raises on purpose, in one tree.

The number is the exit code of the command line.

    SdloraError                   1   never raised itself; what is not in this tree is our bug
    ├── UsageError                2   the call is wrong: unknown option value, missing argument
    ├── InputError                3   a file or folder is missing, unreadable or corrupt
    │   ├── LimitError            3   larger than the reader is willing to look at
    │   └── StorageError          3   a file cannot be written: disk full, read-only, failing
    ├── TrustError                4   signature, threshold or replay: somebody else's packet
    ├── NotForThisDevice          5   a genuine packet, but of another lineage, or out of order
    ├── HealthError               6   canary or parity check failed; the state before is in force
    │   └── DivergedError         6   training left the finite numbers; the tasks before it are kept
    ├── NothingToDo               7   the call is right, and there is no work
    └── ResourceError             8   memory or disk ran out: no verdict on any file; try again

A message names the offending thing first and ends with what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MESSAGE_LIMIT = 1000
"""characters: what a hostile file put into a message cannot flood a log"""


def printable(text: str) -> str:
    """The text on one line, safe for a terminal.

    Whatever a terminal would obey, or cannot show, is written as in JSON (\\n, \\u001b).
    """
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    )


class SdloraError(Exception):
    """Root of the tree; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            _shortened(printable(_shortened(message)))
        )  # printable makes up to twelve characters of one

    def to_dict(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {"message": str(self), "exit_code": self.exit_code}


def _shortened(text: str) -> str:
    half = MESSAGE_LIMIT // 2 - 3
    return text if len(text) <= MESSAGE_LIMIT else f"{text[:half]} ... {text[-half:]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of what a file holds, raised in this block, begin with its name."""
    try:
        yield
    except SdloraError as error:
        if str(error).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error


class UsageError(SdloraError):
    exit_code = 2


class InputError(SdloraError):
    exit_code = 3


class LimitError(InputError):
    pass


class StorageError(InputError):
    pass


class TrustError(SdloraError):
    exit_code = 4


class NotForThisDevice(SdloraError):
    exit_code = 5


class HealthError(SdloraError):
    exit_code = 6


class DivergedError(HealthError):
    pass


class NothingToDo(SdloraError):
    exit_code = 7


class ResourceError(SdloraError):
    exit_code = 8


UNWRITTEN = (StorageError, ResourceError)
"""what a file that cannot be written raises: no fault of what was to be written"""

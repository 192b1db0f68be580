"""What a watcher has met so far: counts, troubles that last, the last error; and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SdloraError
from ...results import Result
from .events import Emit, Events, now


@dataclass(frozen=True)
class Counts(Result):
    """How many packets were applied or refused since the watcher started."""

    applied: int
    waiting: int
    refused: int
    failed: int


@dataclass(frozen=True)
class LastError(Result):
    """The newest error. file: the packet it was about, if it was about one."""

    time: str
    file: Path | None
    error: str
    exit_code: int


@dataclass(frozen=True)
class Served(Result):
    """Where the device stood when the watcher last opened it. All None: never yet."""

    generation: int | None = None
    task: int | None = None
    task_name: str | None = None
    classes: tuple[str, ...] | None = None
    state: str | None = None
    lineage: str | None = None
    bundle: str | None = None
    store_bytes: Mapping[str, int] | None = None
    damage: tuple[str, ...] | None = None


@dataclass(frozen=True)
class WatchReport(Result):
    """What the status file holds: the watcher's own facts, and where the device stands."""

    time: str
    running: bool
    folder: Path
    store: Path
    device: Served
    files: int
    counts: Counts
    trouble: str | None
    last_error: LastError | None

    def to_dict(self) -> dict[str, Any]:
        """One level: the device's facts stand beside the others, in the order of the fields."""
        shown: dict[str, Any] = {}
        for name, value in super().to_dict().items():
            shown |= value if name == "device" else {name: value}
        return shown


class Journal:
    """Tells of each packet and each trouble, counts them, and says each lasting trouble once."""

    def __init__(self, emit: Emit) -> None:
        self.events = Events(emit)
        self.counts: Counter[str] = Counter()
        self.last_error: LastError | None = None
        self._troubles: dict[Path | str, str] = {}

    def applied(self, facts: dict[str, Any]) -> None:
        """A packet is in force."""
        self.counts["applied"] += 1
        self.events.tell("applied", facts)

    def refused(self, event: str, path: Path, error: SdloraError) -> None:
        """A packet was not applied: `failed`, `waiting` or `refused`."""
        self.counts[event] += 1
        self._note(error, path)
        tell = self.events.tell if event == "failed" else self.events.tell_of_file
        tell(event, {"file": str(path), "error": str(error), "exit_code": error.exit_code})

    def trouble(self, event: str, error: Exception, path: Path | None = None) -> None:
        """Something that does not go away by itself. It is told once, until it changes."""
        key, text = path or event, _text(error)
        if self._troubles.get(key) == text:
            return
        self._troubles[key] = text
        self._note(error, path)
        fields = {"error": text, "exit_code": getattr(error, "exit_code", 1)}
        if path is None:
            self.events.tell(event, fields)
        else:
            self.events.tell_of_file(event, {"file": str(path), **fields})

    def recovered(self, event: str) -> None:
        """A trouble is over, which is an event if there was one."""
        if text := self._troubles.pop(event, ""):
            self.events.tell("recovered", {"from": text})

    def forget(self, key: Path | str) -> None:
        """A trouble is over, and nobody needs to hear of it."""
        self._troubles.pop(key, None)

    def keep(self, paths: Collection[Path]) -> None:
        """Forget the troubles of files that are gone."""
        for key in [key for key in self._troubles if isinstance(key, Path) and key not in paths]:
            del self._troubles[key]

    def troubled(self, path: Path) -> bool:
        """Whether there is a trouble with this file."""
        return path in self._troubles

    @property
    def first_trouble(self) -> str | None:
        """The oldest trouble that lasts."""
        return next(iter(self._troubles.values()), None)

    def known_counts(self) -> Counts:
        """The counts that the report shows."""
        return Counts(*(self.counts[name] for name in ("applied", "waiting", "refused", "failed")))

    def _note(self, error: Exception, path: Path | None) -> None:
        self.last_error = LastError(now(), path, _text(error), getattr(error, "exit_code", 1))


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, SdloraError) else repr(error)

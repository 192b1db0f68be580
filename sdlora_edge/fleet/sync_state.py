"""What a device's last sync found: `STORE/fleet/sync.json`, and a part of every report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..formats.canonical import dump_json, parse_exact_json
from ..formats.fields import Kind, digest, either, flag, listed, nothing, record, text, whole
from ..results import Result
from ..storage import atomic
from .rollout import LATEST

FORMAT = "sdlora-edge/sync/1"
SYNC = "fleet/sync.json"
"""in a store"""
LIMIT = 64 * 1024
"""bytes of it"""
NEWEST_ERRORS = 3
MOST_CODE = 255
CANARY_LIMIT = 2**53 - 1
"""A canary's difference in units of 1e-9; a larger one is cut to this."""
_WAITING = 500


@dataclass(frozen=True)
class Progress(Result):
    """The step of a roll-out that a device stands before or at.

    Attributes:
        packet: SHA-256 of the packet's file.
        percent: Percentage of devices in the wave in force.
        included: Whether this device may take it.
    """

    packet: str
    percent: int
    included: bool


@dataclass(frozen=True)
class Failure(Result):
    """An error of a device.

    Attributes:
        time: Unix seconds.
        code: Exit code, as in `sdlora_edge.errors`.
        message: One line.
    """

    time: int
    code: int
    message: str


@dataclass(frozen=True)
class SyncState(Result):
    """What the last sync found.

    Attributes:
        time: Unix seconds when it ended.
        news: Whether the repository had anything new.
        waiting: Why the device does not go on; empty if it waits for nothing.
        step: Where it stands in the roll-out; None if its channel has none.
        errors: The newest ones, the newest last.
        canary_1e9: Largest difference of the last canary times 1e9; None if none was run.
        metadata_expired: The repository's timestamp has expired, so news may be held back.
        clock_behind: The device's clock is before a time that the repository has signed.
    """

    time: int
    news: bool = False
    waiting: str = ""
    step: Progress | None = None
    errors: tuple[Failure, ...] = ()
    canary_1e9: int | None = None
    metadata_expired: bool = False
    clock_behind: bool = False

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return dump_json({"format": FORMAT, **self.to_dict()})

    @classmethod
    def from_json(cls, data: bytes, what: str = "the state of the last sync") -> SyncState:
        """Raises InputError."""
        value = parse_exact_json(data, what)
        try:
            if (found := value.pop("format", None)) != FORMAT:
                raise ValueError(f"format {found!r} is not {FORMAT!r}")
            _SYNC(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{what} is malformed: {error}") from error
        return cls(**value | {"step": as_step(value["step"]), "errors": as_errors(value["errors"])})


def last_sync(store: Path) -> SyncState | None:
    """What the last sync has kept; None if there was none, or its file is damaged."""
    try:
        return SyncState.from_json(atomic.read(store / SYNC, LIMIT))
    except InputError:
        return None


def canary_1e9(difference: float | None) -> int | None:
    """A canary's difference as JSON holds it: times 1e9. NaN and infinity are CANARY_LIMIT."""
    if difference is None:
        return None
    small = 0 <= difference < CANARY_LIMIT / 1e9  # false for NaN
    return round(difference * 1e9) if small else CANARY_LIMIT


def as_step(value: dict[str, Any] | None) -> Progress | None:
    """A checked STEP as an object."""
    return None if value is None else Progress(**value)


def as_errors(value: list[dict[str, Any]]) -> tuple[Failure, ...]:
    """Checked ERRORS as objects."""
    return tuple(Failure(**entry) for entry in value)


STEP: Kind = either(nothing, record({"packet": digest, "percent": whole(0, 100), "included": flag}))
ERRORS: Kind = listed(
    record({"time": whole(0, LATEST), "code": whole(0, MOST_CODE), "message": text(1000)}),
    0,
    NEWEST_ERRORS,
)
CANARY: Kind = either(nothing, whole(0, CANARY_LIMIT))
WAITING: Kind = text(_WAITING)
_SYNC = record(
    {
        "time": whole(0, LATEST),
        "news": flag,
        "waiting": WAITING,
        "step": STEP,
        "errors": ERRORS,
        "canary_1e9": CANARY,
        "metadata_expired": flag,
        "clock_behind": flag,
    }
)

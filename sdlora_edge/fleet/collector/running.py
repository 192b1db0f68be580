"""What the commands `fleet serve`, `enroll` and `devices` ask for."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError, naming
from ...formats.canonical import parse_exact_json
from ...formats.fields import record, text
from ...results import Result
from ...storage import atomic
from ..extras import need
from ..identity import Identity, channel_name, device_groups, device_id, public_hex

if TYPE_CHECKING:
    from .database import Database
    from .driver import Pace
    from .driving import Driver
    from .registry import Enrolled

IDENTITY_LIMIT = 64 * 1024
_NEEDED = {"id": device_id, "name": text(), "channel": channel_name, "groups": device_groups}
_IDENTITY = record({**_NEEDED, "public": public_hex})


@dataclass(frozen=True)
class Choice:
    """The options of `fleet serve`; hours and days are as they are given."""

    database: str
    host: str
    port: int
    token_file: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    client_ca: Path | None
    broker: str
    repository: Path | None
    online_keys: Path | None
    soak: float
    least_hours: float
    unknown_jump: float
    silent_after: float | None
    keep_days: int
    every: float


@dataclass(frozen=True)
class FleetNow(Result):
    """The devices, and how many are in each condition."""

    conditions: Mapping[str, int]
    devices: tuple[Result, ...]

    def head(self) -> tuple[str, ...]:
        """Of the table."""
        return "device", "condition", "task", "channel", "unknown", "last report"

    def cells(self) -> list[tuple[str, ...]]:
        """A row for each device."""
        from .lookups import DeviceRow
        from .paper import ago, percent

        now = int(time.time())
        return [
            (
                d.name or d.id,
                d.condition,
                "" if d.task is None else f"{d.task}: {d.task_name}",
                d.channel,
                percent(d.unknown_rate) if d.total else "",
                ago(d.last_seen, now),
            )
            for d in self.devices
            if isinstance(d, DeviceRow)
        ]


def require_fleet() -> None:
    """Raises UsageError unless the packages of the extra `fleet` are installed."""
    for package in ("sqlalchemy", "alembic", "starlette", "uvicorn", "jinja2", "prometheus_client"):
        need(package, "fleet")


def run(choice: Choice, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises what `listening.serve` does."""
    require_fleet()
    from ..doors import Door
    from .driver import Pace
    from .listening import Service, Upkeep, serve
    from .views import Settings

    if choice.online_keys and not choice.repository:
        raise UsageError("--online-keys belongs to a repository: give --repository too")
    door = Door(
        choice.host,
        choice.port,
        choice.token_file,
        choice.tls_cert,
        choice.tls_key,
        choice.client_ca,
    )
    pace = Pace(choice.soak, choice.least_hours, choice.unknown_jump)
    service = Service(
        choice.database,
        door,
        Settings(_seconds(choice.silent_after), choice.unknown_jump),
        Upkeep(choice.every, choice.keep_days),
        choice.broker,
        _waves(choice.repository, choice.online_keys, pace) if choice.repository else None,
    )
    serve(service, ready)


def _waves(repository: Path, keys: Path | None, pace: Pace) -> Callable[[Database], Driver]:
    need("tuf", "fleet")
    from .driving import Driver

    return lambda database: Driver(database, repository, keys, pace)


def enroll_files(database: str, files: Sequence[Path], replace: bool) -> Enrolled:
    """Accept reports of the devices whose identities these files hold.

    Raises:
        InputError: A file is not an identity.
        UsageError: A device is enrolled with another key.
    """
    require_fleet()
    from .registry import enroll

    found = [read_identity(path) for path in files]
    with _opened(database) as opened:
        return enroll(opened, found, time.time(), replace)


def read_identity(path: Path) -> Identity:
    """Read what `device identity --json` printed. Raises InputError."""
    value = parse_exact_json(atomic.read(path, IDENTITY_LIMIT), str(path))
    try:
        with naming(path):
            known = {name: value[name] for name in (*_NEEDED, "public")}
            _IDENTITY(known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not an identity ({error}): write it with sdlora-edge device identity --json"
        ) from error
    return Identity(**known | {"groups": tuple(known["groups"]), "url": "", "report_to": ()})


def fleet_now(
    database: str, chosen: tuple[str, str, int | None], silent_after: float | None
) -> FleetNow:
    """The fleet as it is now.

    Args:
        database: URL.
        chosen: Channel, group and task; empty or None for all.
        silent_after: Hours.
    """
    require_fleet()
    from .lookups import CONDITIONS, Filter, device_rows

    with _opened(database) as opened:
        rows = device_rows(opened, Filter(*chosen), time.time(), _seconds(silent_after))
    counted = Counter(row.condition for row in rows)
    return FleetNow({name: counted[name] for name in CONDITIONS}, tuple(rows))


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Database]:
    from .database import Database

    with contextlib.closing(Database.open(url)) as database:
        yield database


def _seconds(hours: float | None) -> int | None:
    return None if hours is None else round(3600 * hours)

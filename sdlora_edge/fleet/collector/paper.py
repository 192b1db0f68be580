"""How the dashboard's templates say times, shares and numbers. Jinja escapes every value."""

from __future__ import annotations

import time
from pathlib import Path

import jinja2

from .plots import width_of

MINUTE, HOUR, DAY = 60, 3600, 86_400


def environment() -> jinja2.Environment:
    """The templates of this folder."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "ago": ago,
        "percent": percent,
        "stamp": stamp,
        "iso": iso,
        "bytes": size,
        "width": width_of,
        "period": period,
    }
    return found


def period(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, scale in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{max(0, int(seconds))} s"


def ago(moment: int | None, now: int) -> str:
    """How long ago a time was."""
    return "never" if moment is None else f"{period(now - moment)} ago"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "none" if share is None else f"{100 * share:.{digits}f} %"


def stamp(moment: int | None) -> str:
    """A time in words, in UTC."""
    if moment is None:
        return "never"
    return time.strftime("%d %b %Y %H:%M UTC", time.gmtime(moment))


def iso(moment: int) -> str:
    """A time as HTML has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def size(count: int) -> str:
    """Bytes in a unit that fits; 1 kB is 1000 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"

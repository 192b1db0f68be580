"""Declares what JSON may hold: one kind for each field, with a bound for every number.

A kind is a function that raises ValueError unless its argument has the right type and lies within
its bounds. It also raises TypeError, KeyError or AttributeError for JSON of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .canonical import UNIT, is_sha256
from .limits import LIMITS

ONE = round(1 / UNIT)
"""1 in units of `canonical.UNIT`, in which JSON holds fractions."""
BYTES = 2**53
"""Upper bound of a file size or an offset: JavaScript represents larger integers inexactly."""

Kind = Callable[[Any], object]


def in_units(fraction: float) -> int:
    """The nearest integer number of UNITs."""
    return round(fraction / UNIT)


def whole(least: int, most: int) -> Kind:
    """An integer from `least` to `most`; neither a bool nor a float."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{value!r} is not an integer from {least} to {most}")

    return check


def text(most: int = LIMITS.name) -> Kind:
    """A string of at most `most` characters, without NUL."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > most or "\0" in value:
            raise ValueError(f"{value!r} is not a text of at most {most} characters")

    return check


def line(most: int = LIMITS.name) -> Kind:
    """A text on one line: safe for a terminal, a log and a database."""
    short = text(most)

    def check(value: Any) -> None:
        short(value)
        if not value.isprintable():
            raise ValueError(f"{value!r} holds characters that cannot be shown")

    return check


def flag(value: Any) -> None:
    """True or false."""
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")


def nothing(value: Any) -> None:
    """Null."""
    if value is not None:
        raise ValueError(f"{value!r} is not null")


def one_of(*values: str) -> Kind:
    """One of these strings."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{value!r} is none of {', '.join(values)}")

    return check


def digest(value: Any) -> None:
    """A SHA-256 in lower-case hexadecimal."""
    if not is_sha256(value):
        raise ValueError(f"{value!r} is not a SHA-256")


def listed(kind: Kind, least: int, most: int) -> Kind:
    """A list of `least` to `most` values of one kind."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"not a list of {least} to {most} values")
        for entry in value:
            kind(entry)

    return check


def mapped(kind: Kind) -> Kind:
    """An object with any names and values of one kind."""
    name = text()

    def check(value: Any) -> None:
        for key, entry in value.items():
            name(key)
            _named(key, kind, entry)

    return check


def record(kinds: Mapping[str, Kind]) -> Kind:
    """An object with exactly these fields."""

    def check(value: Any) -> None:
        if value.keys() != kinds.keys():
            odd = sorted(value.keys() ^ kinds.keys())
            raise ValueError(f"field {odd[0]!r} is missing or unknown")
        for name, kind in kinds.items():
            _named(name, kind, value[name])

    return check


def either(first: Kind, second: Kind) -> Kind:
    """A value of one of two kinds."""

    def check(value: Any) -> None:
        try:
            first(value)
        except (ValueError, TypeError, AttributeError):
            second(value)

    return check


def _named(name: str, kind: Kind, value: Any) -> None:
    try:
        kind(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

"""What is declared of a setting, and the checks that follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from ..errors import UsageError


class Range(NamedTuple):
    """The numbers from `low` to `high`; `above` and `below` leave the ends out."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:.10g}"


@dataclass(frozen=True)
class Setting:
    """One setting: everything that is declared of it.

    Args:
        name: key in the TOML file and, with hyphens, the flag of the command line.
        group: table in the TOML file.
        default: also gives the type. A tuple stands for a list of numbers.
        help: a noun phrase or an imperative.
        bound: range of a number (of each number of a list); None for other types.
        choices: the words that are allowed; empty if there is no list of them.
        metavar: what stands for the value in help texts.
    """

    name: str
    group: str
    default: Any
    help: str
    bound: Range | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def flag(self) -> str:
        """As it is written on the command line, such as --head-lr-factor."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def shown_default(self) -> str:
        """The default for a help text; "" if the help text says what it is."""
        if self.kind is bool:
            return "yes" if self.default else "no"
        if self.kind in (int, float):
            return f"{self.default:g}"
        return self.default if self.kind is str else ""

    def check(self, value: Any) -> None:
        """Raise UsageError for a value that is out of range, or not one of the choices."""
        numbers = value if isinstance(value, tuple) else (value,)
        if self.bound and not all(number in self.bound for number in numbers):
            raise UsageError(f"{self.name} is {value}: it must be {self.bound}")
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{self.name} is {value!r}: it must be one of {', '.join(self.choices)}"
            )
        if self.kind is tuple and len(value) not in (0, 3):
            raise UsageError(f"{self.name} must be three numbers, such as 0.5,0.5,0.5")

    def cast(self, value: Any) -> Any:
        """Return the value as the setting's type. TOML's 1 stands for 1.0 too.

        Raises:
            UsageError: if it is of another type.
        """
        try:
            return _cast(self.kind, value)
        except (OverflowError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.name} is {str(value)[:80]!r}: it must be {KINDS[self.kind]}"
            ) from error


KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list of numbers",
}


def _cast(kind: type, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(_cast(float, one) for one in value)
    # int() raises for inf and nan, and float() for a whole number that is too large for a float
    if number and (kind is float or (kind is int and int(value) == value)):
        return kind(value)
    if kind is str and isinstance(value, PurePath):
        return str(value)
    if kind in (str, bool) and type(value) is kind:
        return value
    raise TypeError(kind)


def declared(
    default: Any,
    help: str,
    bound: Range | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
) -> Any:
    return field(
        default=default,
        metadata={"help": help, "bound": bound, "choices": choices, "metavar": metavar},
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Say what to use instead of an unknown word: the nearest known one, and all of them."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {found[0]}? " if found else "") + f"known are {', '.join(known)}"

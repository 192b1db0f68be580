"""What the commands share: options, and how a result reaches stdout as text or as stable JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import printable

Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as one JSON object on stdout.")]
Store = Annotated[Path, typer.Option("--store", help="The device's directory.")]


lost: list[OSError] = []
"""why stdout took no more, if it does not"""


class Incomplete(Exception):
    """A command that was stopped by its cause. done: its result until then, as far as `--json` goes."""

    def __init__(self, done: dict[str, Any]) -> None:
        super().__init__("incomplete")
        self.done = done


@contextlib.contextmanager
def completing(done: dict[str, Any]) -> Iterator[None]:
    """Whatever stops this block, `--json` shows `done`, as it is by then, beside the error."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        raise Incomplete(done) from error


def say(text: str, err: bool = False) -> None:
    """Text on stdout, flushed. A full disk, or a reader that has gone, stops no work: `main` tells of it in the end.

    err: one line, on stderr; if that takes none, the exit code has to do.
    """
    # a packet that is only looked at may hold any text: none of it reaches the terminal as a command
    try:
        if err:
            typer.echo(" ".join(text.split()), err=True)
        elif not lost:
            typer.echo(printable(text))
    except OSError as error:
        if not err:
            lost.append(error)


def emit(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """The result, on stdout: JSON, or what `text` makes of it."""
    say(json.dumps(value, ensure_ascii=False, allow_nan=False) if as_json else text())


def facts(value: dict[str, Any], *names: str) -> str:
    """Some entries of a result, a line each."""
    width = max((len(name) for name in names), default=0)
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_short(value[name])}" for name in names)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(str(v) for v in value[:12])
        return f"{len(value)}: {shown}" + (", ..." if len(value) > 12 else "")
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, aligned to the right but for the first."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )

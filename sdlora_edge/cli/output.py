"""What the commands share: options, and how a result reaches stdout as text or as stable JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..device.store import store_around
from ..errors import UsageError, printable
from ..storage import atomic

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result, or the error, as one JSON object on stdout."),
]
Store = Annotated[Path, typer.Option("--store", help="The device's directory.")]


def output(path: Path | None) -> Path | None:
    """The callback of every option and argument that names what a command writes.

    Raises UsageError inside a store, whose files only its own commands write, and for a link, a pipe or a device.
    """
    if path is not None:
        atomic.require_replaceable(path)
        if store := store_around(path):
            raise UsageError(f"{path} lies in the store {store}: choose a path outside it")
    return path


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


def emit(value: Any, as_json: bool, text: Callable[[], list[str]]) -> None:
    """The result, on stdout: JSON, or the lines that `text` makes of it."""
    say(*([json.dumps(value, ensure_ascii=False, allow_nan=False)] if as_json else text()))


def say(*lines: str, err: bool = False) -> None:
    """Lines on stdout, and not one more, whatever they hold: a packet that is only looked at may hold any text. A full disk, or a
    reader that has gone, stops no work: `main` tells of it in the end.

    err: on stderr instead; if that takes none, the exit code has to do.
    """
    try:
        if err or not lost:
            print(
                *map(printable, lines), sep="\n", file=sys.stderr if err else sys.stdout, flush=True
            )
    except OSError as error:
        if not err:
            lost.append(error)


def facts(value: dict[str, Any], *names: str) -> list[str]:
    """Some entries of a result, a line each."""
    width = max((len(name) for name in names), default=0)
    return [f"{name.replace('_', ' '):{width}}  {_short(value[name])}" for name in names]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(str(v) for v in value[:12])
        return f"{len(value)}: {shown}" + (", ..." if len(value) > 12 else "")
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, aligned to the right but for the first."""
    lines = [head, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def spaced(parts: Sequence[Sequence[str]]) -> list[str]:
    """The parts' lines, with an empty line between two parts."""
    return [line for part in parts for line in ("", *part)][1:]

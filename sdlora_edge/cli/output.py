"""How a result reaches stdout: as text, as tables on a terminal, or as stable JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer

from ..errors import UsageError, printable
from ..results import Result
from ..storage import atomic
from . import terminal

if TYPE_CHECKING:
    from ..device.answers import Prediction

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result, or the error, as one JSON object on stdout."),
]


def output(path: Path | None) -> Path | None:
    """Check a path that a command writes: the callback of every such option.

    Raises:
        UsageError: The path is a link, a pipe or a device, or lies inside a store. Only the
            device commands write there.
    """
    if path is not None:
        atomic.require_replaceable(path)
        from ..device.store import store_around

        if store := store_around(path):
            raise UsageError(f"{path} lies in the store {store}: choose a path outside it")
    return path


lost: list[OSError] = []
"""Why stdout takes no more output; empty while it does."""


class Incomplete(Exception):
    """A command stopped by its cause. `done` is what `--json` shows of its result until then."""

    def __init__(self, done: dict[str, Any]) -> None:
        super().__init__("incomplete")
        self.done = done


@contextlib.contextmanager
def completing(done: dict[str, Any]) -> Iterator[None]:
    """If anything stops this block, `--json` shows `done`, as it is by then, beside the error."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        raise Incomplete(done) from error


@dataclass(frozen=True)
class Table:
    """Columns of text: the first is aligned to the left, the others to the right.

    head: the columns' names; empty for a list of names and values, which is aligned to the left.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def plain(self) -> list[str]:
        """Its lines, for a pipe or a file."""
        lines = [*([self.head] if self.head else []), *self.rows]
        widths = (
            [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
        )
        return [
            "  ".join(
                cell.rjust(width) if self.head and i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]

    def draw(self, stream: Any) -> None:
        """Print it on a terminal."""
        from rich import box
        from rich.table import Table as Drawing
        from rich.text import Text

        drawing = Drawing(
            box=box.SIMPLE_HEAD if self.head else None,
            show_header=bool(self.head),
            header_style="bold",
            show_edge=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for i in range(len(self.head or self.rows[0])):
            drawing.add_column(
                self.head[i] if self.head else "",
                justify="right" if self.head and i else "left",
                style="cyan" if not self.head and not i else "",
                overflow="fold",
                no_wrap=not self.head and not i,
            )
        for row in self.rows:
            drawing.add_row(*map(Text, row))
        terminal.console(stream).print(drawing)


Line = Union[str, Table]


def emit(
    value: Result | Mapping[str, Any], as_json: bool, text: Callable[[], Sequence[Line]]
) -> None:
    """Print a result on stdout: as JSON, or as the lines and tables that `text` makes of it."""
    if as_json:
        say(json.dumps(fields(value), ensure_ascii=False, allow_nan=False))
    else:
        say(*text())


def fields(value: Result | Mapping[str, Any]) -> dict[str, Any]:
    """A result as `--json` shows it."""
    return value.to_dict() if isinstance(value, Result) else dict(value)


def say(*lines: Line, err: bool = False) -> None:
    """Print each line as one line, whatever it holds: a packet that is inspected may hold any text.

    A full disk, or a reader that has gone, stops no work: `main` reports it when the command ends.

    Args:
        lines: Lines and tables.
        err: Print on stderr instead. If that takes none, the exit code has to do.
    """
    try:
        if err or not lost:
            stream = sys.stderr if err else sys.stdout
            with terminal.lock:
                for line in lines:
                    _print(line, stream)
                stream.flush()
    except OSError as error:
        if not err:
            lost.append(error)


def _print(line: Line, stream: Any) -> None:
    if isinstance(line, str):
        kind, colon, rest = line.partition(": ")
        if kind in _STYLES and colon and terminal.fancy(stream):
            from rich.text import Text

            shown = Text.assemble((kind, _STYLES[kind]), ": ", printable(rest))
            terminal.console(stream).print(shown, soft_wrap=True)
        else:
            print(printable(line), file=stream)
    elif line.rows and terminal.fancy(stream):
        line.draw(stream)
    else:
        print(*line.plain(), sep="\n", end="\n" if line.rows or line.head else "", file=stream)


_STYLES = {"error": "bold red", "internal error": "bold red", "interrupted": "bold yellow"}
"""How the first words of a line look on a terminal."""


def facts(value: Result | Mapping[str, Any], *names: str) -> list[Line]:
    """Some fields of a result, each on its own line."""
    found = fields(value)
    return [Table((), tuple((name.replace("_", " "), _short(found[name])) for name in names))]


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(str(v) for v in value[:12])
        value = f"{len(value)}: {shown}" + (", ..." if len(value) > 12 else "")
    elif isinstance(value, float):
        value = f"{value:.4g}"
    return printable(str(value))


def answered(answer: Prediction) -> str:
    """What a device answers for an image: the classes, or `unknown` before the best guesses."""
    classes = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in answer.top)
    if answer.known:
        return classes
    guess = "guess" if len(answer.top) == 1 else "guesses"
    lack = f"score {answer.score:.4g} < {answer.threshold:.4g}"
    return f"unknown (best {guess}: {classes}; {lack})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Line]:
    """A table with a head."""
    return [Table(tuple(head), tuple(tuple(map(printable, row)) for row in rows))]


def spaced(parts: Sequence[Sequence[Line]]) -> list[Line]:
    """The lines of all parts, with an empty line between two parts."""
    return [line for part in parts for line in ("", *part)][1:]

"""The check before training: what a source holds, what is not used, and what may be a mistake."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..storage import atomic
from . import distributed
from .files import counted, ordinary
from .folder import SKIPPED
from .items import Item
from .settings import Settings
from .source import Source
from .splits import Part

log = logging.getLogger("sdlora_edge")
FEW = 5
"""The user is warned if a class has fewer training images than this."""
ROWS = 40
"""Of the table. A longer one shows only the classes that something is wrong with."""
NAMED = 5
"""Number of classes or files that a warning names."""
DECODED = 10**9
"""Pixels that are decoded, about ten seconds' work. Of later images only the headers are read."""
UNREADABLE = "unreadable"
_COLUMNS = ("class", "training", "validation", "test", "skipped")


def checked(
    source: Source, cut: Callable[[Source], list[Part]], settings: Settings
) -> tuple[Source, list[Part]]:
    """Read every image of a source, and log a table of what is there.

    Args:
        source: Where the images are.
        cut: Makes the tasks of a source.
        settings: Of the run.

    Returns:
        The source and its tasks, in which an image that cannot be read has a `problem`.

    Raises:
        InputError: if a class of a task has no readable training image; if there is a warning, and
            the setting `strict` makes it an error.
    """
    source = source.changed(_Examiner())
    parts = cut(source)
    rows, skipped = _rows(source, parts, settings), _skipped(source)
    odd = _odd_classes(source, rows, "validation" if settings.data.validate else "test")
    warnings = [f"{what}: {_some(labels)}" for what, labels in odd.items() if labels] + list(
        _file_warnings(source)
    )
    if distributed.first():
        for line in _table(rows, skipped, {label for labels in odd.values() for label in labels}):
            # indented: the name of a class must not look like the start of a message
            log.info("  %s", line)
        for warning in warnings:
            log.warning("%s", warning)
    for part in parts:
        if empty := [label for label in part.classes if not _readable(part.train[label])]:
            raise InputError(
                f"{source.name}: class {empty[0]!r} has no readable training {source.noun}:"
                " repair its files or remove its folder"
            )
    if warnings and settings.data.strict:
        raise InputError(
            f"{source.name}: {warnings[0]} ({len(warnings)} warning(s), which --strict makes"
            " errors): repair the dataset"
        )
    return source, parts


def record(run: Path, source: Source) -> None:
    """Add the files that are not used to the list in the folder of a run."""
    known = (
        atomic.read(run / SKIPPED).decode()
        if (run / SKIPPED).exists()
        else "file,class,reason,detail\n"
    )
    own = [*map(_line, unused(source))]
    atomic.write(
        run / SKIPPED, "".join(dict.fromkeys([*known.splitlines(keepends=True), *own])).encode()
    )
    if own:
        log.info("%s says why files are not used: %d of this dataset", run / SKIPPED, len(own))


def unused(source: Source) -> list[Item]:
    """Return the files of a source that are not used."""
    sides = (source.train, source.test, source.val)
    return [
        *source.skipped,
        *(p for side in sides for own in side.values() for p in own if p.problem),
    ]


class _Examiner:
    """Decodes images until DECODED pixels are spent, then reads headers only."""

    def __init__(self) -> None:
        self._left = DECODED

    def __call__(self, image: Item) -> Item:
        try:
            self._left -= image.examine(decode=self._left > 0)
        except InputError as error:
            return replace(
                image, problem=UNREADABLE, detail=str(error).removeprefix(f"{image.name} ")
            )
        return image


def _line(image: Item) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(
        (image.name, image.label, image.problem, image.detail)
    )
    return line.getvalue()


def _readable(images: Sequence[Item]) -> int:
    return sum(not image.problem for image in images)


def _skipped(source: Source) -> dict[str, list[str]]:
    """Return why files are not used, by class; "" stands for files in no class."""
    found: dict[str, list[str]] = {}
    for image in unused(source):
        found.setdefault(image.label, []).append(image.problem)
    return found


def _rows(source: Source, parts: Sequence[Part], settings: Settings) -> dict[str, Counter[str]]:
    """Return the counts of each class, and of each folder without an image, by column."""
    sides = [("training", part.train) for part in parts]
    sides += [("validation" if settings.data.validate else "test", part.test) for part in parts]
    sides += [("test", source.test) if settings.data.validate else ("validation", source.val)]
    rows: dict[str, Counter[str]] = {p.label: Counter() for p in source.skipped if p.label}
    for column, side in sides:
        for label, own in side.items():
            rows.setdefault(label, Counter())[column] += _readable(own)
    return dict(sorted(rows.items()))


def _odd_classes(
    source: Source, rows: Mapping[str, Counter[str]], scored: str
) -> dict[str, list[str]]:
    """Return the classes to warn of, by what is wrong."""
    few = [label for label in source.classes if rows[label]["training"] < FEW]
    return {
        f"classes without a readable {source.noun}": [
            label for label in rows if label not in source.train
        ],
        f"classes with fewer than {FEW} training {source.noun}s": few,
        f"classes without a {scored} {source.noun}": [
            label for label in source.classes if not rows[label][scored]
        ],
    }


def _file_warnings(source: Source) -> Iterator[str]:
    """Yield warnings of images that are not used, and of those whose class is not certain."""
    by_problem: dict[str, list[str]] = {}
    for image in unused(source):
        if not ordinary(image.problem):
            by_problem.setdefault(image.problem, []).append(f"{image.name} {image.detail}".rstrip())
    for problem, names in by_problem.items():
        yield f"{len(names)} skipped, {problem}: {_some(names)}"
    nested = [
        p.name
        for side in (source.train, source.test, source.val)
        for own in side.values()
        for p in own
        if p.nested
    ]
    if nested:
        yield (
            f"{len(nested)} in a folder inside a class folder, used as {source.noun}s of that"
            f" class: {_some(nested)}"
        )


def _table(
    rows: Mapping[str, Counter[str]], skipped: Mapping[str, list[str]], odd: set[str]
) -> Iterator[str]:
    """Yield lines: all classes or, if there are many, the odd ones; then the totals."""
    shown = [label for label in rows if len(rows) <= ROWS or label in odd or label in skipped][
        :ROWS
    ]
    cells = [list(_COLUMNS)] + [
        _cells(label, rows[label], skipped.get(label, [])) for label in shown
    ]
    total: Counter[str] = sum(rows.values(), Counter())
    every = [problem for problems in skipped.values() for problem in problems]
    cells.append(_cells(f"all {len(rows)}", total, every))
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS) - 1)]
    for row in cells:
        yield "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]
        ).rstrip()
    if hidden := len(rows) - len(shown):
        yield f"{hidden} more classes are not shown"


def _cells(label: str, row: Counter[str], problems: list[str]) -> list[str]:
    return [label, *(str(row[column]) for column in _COLUMNS[1:-1]), counted(problems)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

"""Groups of images, as a person names and changes them, and the folder that is made of them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..device.answers import Prediction
from ..errors import UsageError
from ..formats.packet import name_problem
from ..results import Result
from ..storage import atomic, disk
from ..train.folders import SPLITS

NEW, THROWN = 0, -1
"""numbers that stand for a new group, and for what is thrown away"""


@dataclass
class Group:
    """Images that somebody may call one class.

    Attributes:
        number: By which the page names it.
        images: Their indices.
        name: Of the class; empty if it has none yet.
    """

    number: int
    images: list[int]
    name: str = ""


@dataclass(frozen=True)
class Suggestion:
    """The known class that most images of a group are nearest to, and how many of them."""

    name: str
    images: int


@dataclass(frozen=True)
class Written(Result):
    """The folder of a new task.

    Attributes:
        out: The folder; None if nothing was written.
        classes: Number of images of each class.
        known: Those of the classes that the model knows already.
        unnamed: Number of images that are left out, because their group has no name.
        thrown: Number of images that were thrown away.
    """

    out: Path | None
    classes: Mapping[str, int] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    unnamed: int = 0
    thrown: int = 0


class Board:
    """What is sorted so far.

    Args:
        paths: The images.
        answers: What the model answers for each.
        classes: Names of the classes that the model knows.
        groups: Indices of the images of each group.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        answers: Sequence[Prediction],
        classes: Collection[str],
        groups: Iterable[list[int]],
    ) -> None:
        self.paths, self.answers, self.classes = paths, answers, classes
        self.groups = [Group(n, list(images)) for n, images in enumerate(groups, 1)]
        self.thrown = Group(THROWN, [])
        self.written = Written(None)

    def suggestion(self, group: Group) -> Suggestion:
        """Find the known class that is nearest to a group."""
        ((name, count),) = Counter(self.answers[i].label for i in group.images).most_common(1)
        return Suggestion(name, count)

    def names(self) -> list[str]:
        """Every name that a group may get: of known classes, and those given here."""
        return sorted({*self.classes, *(g.name for g in self.groups if g.name)})

    def name(self, number: int, name: str) -> None:
        """Name a group. Two groups of one name become one class. An empty name takes it back.

        Raises UsageError if no class can have this name; the old one stays.
        """
        name = unicodedata.normalize("NFC", name.strip())
        if name and (problem := class_problem(name)):
            raise UsageError(f"the class name {name!r} {problem}: choose another")
        self._group(number).name = name

    def move(self, images: Collection[int], to: int) -> None:
        """Move images to another group, to NEW, or to THROWN.

        Raises UsageError if there is no such image or group.
        """
        if not images:
            raise UsageError("nothing is selected: select some first")
        if odd := [i for i in images if not 0 <= i < len(self.paths)]:
            raise UsageError(f"there is no number {odd[0]}: load the page again")
        everywhere = [*self.groups, self.thrown]
        if to == NEW:
            target = Group(max((g.number for g in self.groups), default=0) + 1, [])
            self.groups.append(target)
        else:
            target = self._group(to)
        chosen = [i for g in everywhere for i in g.images if i in set(images)]
        for group in everywhere:
            group.images = [i for i in group.images if i not in set(images)]
        target.images += chosen
        self.groups = [group for group in self.groups if group.images]

    def write(self, out: Path) -> Written:
        """Write the folder that `train --run` takes, a folder for each class.

        It belongs to this user alone. What this board wrote before is replaced.

        Raises:
            UsageError: No group has a name, or the folder exists.
            StorageError: It cannot be written.
        """
        by_class: dict[str, list[int]] = {}
        for group in self.groups:
            if group.name:
                by_class.setdefault(group.name, []).extend(group.images)
        if not by_class:
            raise UsageError("no group has a name: name one first")
        again = self.written.out == out
        fresh = out.with_name(f".{out.name}.new") if again else out
        if again:
            _change(fresh, lambda: atomic.remove(fresh))  # a killed program left it
        with atomic.new_folder(fresh, 0o700) as folder:
            for name, images in by_class.items():
                disk.mkdir(folder / name)
                for target, i in self._named(images):
                    atomic.copy(self.paths[i], folder / name / target)
        if again:  # what was written before is gone only once the new folder is complete
            _change(out, lambda: atomic.remove(out))
            _change(out, lambda: disk.rename(fresh, out))
        self.written = Written(
            out,
            {name: len(images) for name, images in sorted(by_class.items())},
            tuple(sorted(set(by_class) & set(self.classes))),
            sum(len(group.images) for group in self.groups if not group.name),
            len(self.thrown.images),
        )
        return self.written

    def _named(self, images: Iterable[int]) -> Iterable[tuple[str, int]]:
        """(name in the class folder, image): two devices may have given one name."""
        used: set[str] = set()
        for i in sorted(images):
            name = self.paths[i].name
            name = f"{i}-{name}" if name.casefold() in used else name
            used.add(name.casefold())
            yield name, i

    def _group(self, number: int) -> Group:
        for group in (*self.groups, self.thrown):
            if group.number == number:
                return group
        raise UsageError(f"there is no group {number}: load the page again")


def _change(folder: Path, change: Callable[[], object]) -> None:
    try:
        change()
    except OSError as error:
        raise atomic.unwritten(folder, error) from error


def class_problem(name: str) -> str | None:
    """Say why a folder of this name makes no class. None means that it does."""
    if name.startswith((".", "__MACOSX")):
        return "would make a hidden folder"
    if name.casefold() in SPLITS:
        return "is that of a folder with a split"
    return name_problem(name)

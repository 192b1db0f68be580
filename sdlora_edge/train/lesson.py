"""What one task brings: its images, its classes, and the run that it follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..method.sdlora import Head, zero_head
from ..state import UNUSED, TaskState
from . import splits
from .evaluator import Evaluator
from .plan import ClassChanges
from .run import Run
from .splits import Images, Part

FEW = 5
"""images of a class that are too few to hold one out"""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A task while it is learned: what it brings to a run whose newest task is the one before it.

    Changes of known classes come before the new classes, as in `TaskUpdate`. So the name of a
    retired class may come back as a new class in the same task; it gets a new row.
    """

    run: Run
    part: Part
    images: Images
    changes: ClassChanges = field(default_factory=ClassChanges)

    @classmethod
    def of(cls, run: Run, part: Part, changes: ClassChanges = ClassChanges()) -> Lesson:
        """Read the images of a task.

        Raises UsageError for a change that the run's classes do not allow.
        """
        if changes:
            changes.check(run.states[-1].names)
        cache_gb = run.config.training.cache_gb
        return cls(
            run, part, splits.read(part.train, part.classes, run.preprocessing, cache_gb), changes
        )

    @property
    def number(self) -> int:
        """t, counted from 1."""
        return len(self.run.states)

    @property
    def seed(self) -> int:
        """Of everything that is drawn for the task."""
        return self.run.config.training.seed * 1009 + self.number

    @cached_property
    def before(self) -> TaskState:
        """The state of task t-1."""
        return self.run.states[-1]

    @cached_property
    def retired(self) -> tuple[int, ...]:
        """The rows of classes that the task retires, ascending."""
        return tuple(sorted(self.before.classes.index(name) for name in self.changes.retired))

    @cached_property
    def renamed(self) -> tuple[tuple[int, str], ...]:
        """(row, new name) of classes that the task renames, ascending."""
        names = self.changes.renamed.items()
        return tuple(sorted((self.before.classes.index(old), new) for old, new in names))

    @cached_property
    def known(self) -> tuple[str | None, ...]:
        """The class of each head row after the changes, without the new classes."""
        names = {**dict(enumerate(self.before.classes)), **dict(self.renamed)}
        return tuple(None if row in self.retired else name for row, name in names.items())

    @cached_property
    def new(self) -> tuple[str, ...]:
        """The classes that the run does not know."""
        return tuple(c for c in self.part.classes if c not in self.known)

    @cached_property
    def classes(self) -> tuple[str | None, ...]:
        """The class of each head row after the task; None if it is retired."""
        return self.known + self.new

    @cached_property
    def live(self) -> list[int]:
        """The head rows that may be answered after the task, ascending."""
        return [row for row, name in enumerate(self.classes) if name is not None]

    @cached_property
    def rows(self) -> np.ndarray:
        """int (n,): the head row of each class of the task."""
        return np.array([self.classes.index(c) for c in self.part.classes], np.int64)

    @cached_property
    def targets(self) -> np.ndarray:
        """int (N,): the head row of each image."""
        rows: np.ndarray = self.rows[self.images.targets]
        return rows

    @cached_property
    def held_out(self) -> np.ndarray:
        """int (n,), ascending: images that the direction is not trained on."""
        random = np.random.RandomState(self.seed % 2**32)
        return held_out(self.images.targets, self.run.config.data.held_out, random)

    @cached_property
    def taught(self) -> Images:
        """The images that the direction is trained on: the others."""
        taught = np.setdiff1d(np.arange(len(self.images)), self.held_out)
        return self.images if not len(self.held_out) else self.images.subset(taught)

    @cached_property
    def plain(self) -> Head:
        """The plain head of all classes to start from.

        Rows of new classes are zero; rows of retired classes are never answered.
        """
        weight, bias = self.run.kept.plain
        more = zero_head(len(self.new), weight.shape[1])
        weight, bias = np.concatenate([weight, more[0]]), np.concatenate([bias, more[1]])
        weight[list(self.retired)], bias[list(self.retired)] = 0.0, UNUSED
        return weight, bias

    @cached_property
    def head(self) -> Head:
        """The plain head's rows of this task's classes to start from."""
        return self.plain[0][self.rows], self.plain[1][self.rows]

    @cached_property
    def under_old_weights(self) -> Evaluator:
        """The evaluator under the weights before the task."""
        return Evaluator.at(self.run, self.before.task)


def held_out(targets: np.ndarray, share: float, random: np.random.RandomState) -> np.ndarray:
    """Choose a share of the images of each class, at least one: int (n,), ascending.

    targets: int (N,), the class of each image. Of a class with few images none is chosen.
    """
    chosen = [np.zeros(0, np.int64)]
    for c in np.unique(targets):
        own = random.permutation(np.flatnonzero(targets == c))
        chosen.append(own[: math.ceil(share * len(own)) if len(own) >= FEW else 0])
    return np.sort(np.concatenate(chosen))

"""The states and updates of a run's tasks, read when they are asked for.

A run of 100 tasks of a ViT-B would otherwise hold a head for each task (of hundreds of classes) and
all factors. Only the newest state is held, and a few others that were asked for last. An older
state is computed again from the updates before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar, overload

from ..state import TaskState, TaskUpdate, advance

HELD_UPDATES, HELD_STATES = 16, 4
"""besides the newest state: how many are held"""
T = TypeVar("T")


class History:
    """The tasks of a run.

    Args:
        first: The state before the first task.
        read: Gives the update of a task, counted from 1.
    """

    def __init__(self, first: TaskState, read: Callable[[int], TaskUpdate]) -> None:
        self.first, self.newest = first, first
        self._read = read
        self._unwritten: dict[int, TaskUpdate] = {}
        self._recent: dict[int, TaskState] = {}
        self.update = lru_cache(HELD_UPDATES)(self._update)

    def follow(self, update: TaskUpdate, written: bool = False) -> None:
        """Take an update as the newest task. written:

        `read` can give it, so it need not be held.
        """
        self.newest = advance(self.newest, update)
        if not written:
            self._unwritten[update.task] = update

    def _update(self, task: int) -> TaskUpdate:
        return self._unwritten.get(task) or self._read(task)

    def state(self, task: int) -> TaskState:
        """The state after a task, task 0 included."""
        if task == self.newest.task:
            return self.newest
        # Begin at the nearest state that is held: whoever goes from first to last takes one step
        # for each task.
        nearest = max((t for t in self._recent if t <= task), default=0)
        found = self._recent.get(nearest, self.first)
        for number in range(found.task + 1, task + 1):
            found = advance(found, self.update(number))
        self._recent.pop(task, None)
        self._recent[task] = found
        while len(self._recent) > HELD_STATES:
            del self._recent[next(iter(self._recent))]
        return found

    @property
    def states(self) -> Sequence[TaskState]:
        """states[t] is the state after task t."""
        return _View(self.newest.task + 1, self.state)

    @property
    def updates(self) -> Sequence[TaskUpdate]:
        """updates[t - 1] is task t as it is shipped."""
        return _View(self.newest.task, lambda index: self.update(index + 1))


class _View(Sequence[T]):
    """A sequence whose entries are made when they are asked for; a slice is a view too."""

    def __init__(self, count: int | Sequence[int], entry: Callable[[int], T]) -> None:
        self._indices = range(count) if isinstance(count, int) else count
        self._entry = entry

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return _View(self._indices[index], self._entry)
        return self._entry(self._indices[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._entry, self._indices)

"""Stages of long work: library code names them, and a program may show them.

Nothing is shown unless a program asks for it with `watching`; the command line does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Advance = Callable[[], None]
"""Call it after each finished step of a stage that has a total."""

Watcher = Callable[[str, "int | None"], AbstractContextManager[Advance]]
"""Shows a stage (name, number of steps or None) while its block runs."""


def _ignore() -> None:
    pass


def _nobody(_name: str, _total: int | None) -> AbstractContextManager[Advance]:
    return nullcontext(_ignore)


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[Advance]:
    """Name the work of a block that may take over two seconds.

    Args:
        name: What is being done, as "exporting to ONNX": lower case, no full stop.
        total: Number of steps, if it is known: call what the block gets after each.
    """
    with _watcher.get()(name, total) as advance:
        yield advance


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show the stages of this block, in this thread, with `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)

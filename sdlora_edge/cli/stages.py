"""How the command line shows a stage.

On a terminal, a line counts the seconds and steps; elsewhere, one plain line tells of its start.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

from ..errors import printable
from ..progress import Advance
from . import terminal

TICK = 0.2
"""Seconds between two looks at the line of a stage."""
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BAR = 20

log = logging.getLogger("sdlora_edge")


@contextlib.contextmanager
def show(name: str, total: int | None) -> Iterator[Advance]:
    """The watcher of every command: `progress.watching(show)`."""
    if not terminal.fancy(sys.stderr):
        log.info("%s ...", name)
        yield lambda: None
        return
    line = _Line(name, total)
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    try:
        yield line.advance
    finally:
        line.ended.set()
        thread.join()


class _Line:
    """One running stage on the terminal. If two are nested, only the inner one is shown."""

    running: ClassVar[list[_Line]] = []

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self.began = time.monotonic()
        self.ended = threading.Event()

    def advance(self) -> None:
        self.done += 1

    def run(self) -> None:
        self.running.append(self)
        while not self.ended.wait(TICK):
            with terminal.lock:
                # text that has not ended its line (a prompt, a progress bar) must stay readable
                if self.running[-1] is self and (
                    terminal.Escaping.drawn or not terminal.Escaping.in_line
                ):
                    self._draw()
        with terminal.lock:
            terminal.make_room()
            self.running.remove(self)

    def _draw(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            stream = terminal.raw(sys.stderr)
            stream.write(f"{terminal.ERASE}{self.text()}")
            stream.flush()
            terminal.Escaping.drawn = True

    def text(self) -> str:
        """What the line says now, cut to the width of the terminal."""
        seconds = time.monotonic() - self.began
        text = f"{_SPINNER[int(seconds / TICK) % len(_SPINNER)]} {printable(self.name)}"
        if self.total:
            full = _BAR * min(self.done, self.total) // self.total
            text += f" {'━' * full}{'╌' * (_BAR - full)} {self.done}/{self.total}"
        text += f" {int(seconds)} s"
        return text[: shutil.get_terminal_size().columns - 1]

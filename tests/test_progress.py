"""Stages of long work: silent in a library, shown to whoever watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdlora_edge.progress import Advance, stage, watching


def test_a_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("exporting") as plain, stage("proving", 2) as advance:
        plain()
        advance()
    assert capsys.readouterr() == ("", "")


def test_who_watches_sees_stages_and_steps_and_their_end() -> None:
    seen: list[object] = []

    @contextmanager
    def watcher(name: str, total: int | None) -> Iterator[Advance]:
        seen.append((name, total))
        try:
            yield lambda: seen.append("step")
        finally:
            seen.append("end")

    def fail() -> None:
        with stage("proving", 2) as advance:
            advance()
            raise ValueError

    with watching(watcher), pytest.raises(ValueError, match=r"^$"):
        fail()
    with stage("unseen"):
        pass
    assert seen == [("proving", 2), "step", "end"]

"""Stages of long work: silent in a library, shown to whoever watches."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sdlora_edge.cli import stages, terminal
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


def test_in_a_pipe_a_stage_is_one_line_at_its_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "sdlora_edge")
    with watching(stages.show), stage("proving", 2) as advance:
        assert caplog.messages == ["proving ..."]
        advance()
    assert caplog.messages == ["proving ..."]


def test_a_terminal_gets_a_line_that_gives_way_to_text(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(terminal, "fancy", lambda stream: True)
    monkeypatch.setattr(stages, "TICK", 0.01)
    monkeypatch.setattr(sys, "stderr", terminal.Log(written))
    with watching(stages.show), stage("outer"), stage("proving \x1b[2J", 4) as advance:
        advance()
        _until(lambda: "1/4" in written.getvalue())
        print("a result", file=sys.stderr)
        _until(lambda: written.getvalue().endswith(" s"))
        print("no end of", end=" ", file=sys.stderr)
        time.sleep(0.1)
        print("line", file=sys.stderr)
    shown = written.getvalue()
    assert f"{terminal.ERASE}a result\n" in shown
    assert "no end of line\n" in shown
    assert "━━━━━╌╌" in shown
    assert "\x1b[2J" not in shown
    assert shown.split("\n")[-1] in ("", terminal.ERASE) or shown.endswith(terminal.ERASE)


def _until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)

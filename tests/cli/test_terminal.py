"""No text that came out of a file makes a terminal do anything, or looks like a line of ours."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm
from conftest import Result, make_images

from sdlora_edge.cli.output import emit, facts, say, table
from sdlora_edge.cli.terminal import Escaping, OneLine, terminal
from sdlora_edge.device import Device
from sdlora_edge.device.watch.events import JsonLog
from sdlora_edge.errors import InputError, printable

Cli = Callable[..., Result]
EVIL = "\x1b]0;title\x07\x1b[2J\r\nerror: forged\x9b2J\u202e\u2028error: forged\ud800"
SHOWN = printable(EVIL)


def harmless(text: str) -> None:
    assert text
    for line in text.removesuffix("\n").split("\n"):
        assert line.isprintable(), text
        assert not line.startswith("error: forged"), text


def test_printable_is_one_line_that_tells_all() -> None:
    assert SHOWN.isprintable()
    assert json.loads(f'"{SHOWN}"') == EVIL
    assert printable("Käse 猫 \\ \"'") == "Käse 猫 \\ \"'"
    assert str(InputError(EVIL)) == SHOWN


def test_results_are_shown_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    emit(
        {},
        False,
        lambda: [
            *facts({"a": EVIL, "b": [EVIL]}, "a", "b"),
            *table(["x", "y"], [[EVIL, "1"]]),
            f"{EVIL}!",
        ],
    )
    say(EVIL)
    say(EVIL, err=True)
    captured = capsys.readouterr()
    harmless(captured.out)
    assert len(captured.out.splitlines()) == 2 + 2 + 1 + 1
    assert captured.err == f"{SHOWN}\n"


def test_news_has_no_label_and_numbers_are_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    def line(level: int, text: str) -> str:
        record = logging.LogRecord("sdlora_edge", level, "", 0, text, (), None)
        return OneLine("%(message)s").format(record)

    assert line(logging.INFO, "exporting ...") == "exporting ..."
    assert line(logging.WARNING, "few images") == "warning: few images"
    assert line(logging.INFO, EVIL) == SHOWN
    emit({}, False, lambda: facts({"difference": 1.2874603271484375e-05}, "difference"))
    assert capsys.readouterr().out == "difference  1.287e-05\n"


def printed() -> None:
    print(EVIL.replace("\n", ""))


def warned() -> None:
    print(
        warnings.formatwarning(EVIL.replace("\n", ""), UserWarning, __file__, 1), file=sys.stderr
    )  # pytest keeps real ones


def logged() -> None:
    logging.getLogger("sdlora_edge").warning("%s is skipped", EVIL)


def logged_by_others() -> None:
    handler = logging.StreamHandler()
    logging.getLogger("theirs").addHandler(handler)
    logging.getLogger("theirs").error(EVIL.replace("\n", ""))
    logging.getLogger("theirs").removeHandler(handler)


def in_progress() -> None:
    for _ in tqdm.tqdm(range(2), desc=EVIL.replace("\n", "").replace("\r", ""), file=sys.stderr):
        pass


def raised() -> None:
    raise InputError(EVIL)


def a_bug() -> None:
    raise RuntimeError(EVIL)


@pytest.mark.parametrize(
    "way", [printed, warned, logged, logged_by_others, in_progress, raised, a_bug]
)
def test_whatever_way_it_goes(
    cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[], None]
) -> None:
    status = Device.status

    def evil(self: Device) -> dict[str, object]:
        way()
        return status(self)

    monkeypatch.setattr(Device, "status", evil)
    for arguments in ((), ("--debug",)):
        result = cli(*arguments, "device", "status", "--store", store)
        harmless(result.out + result.err.replace("\r", ""))  # of the bar
        assert "forged" in result.out + result.err


def test_arguments_are_names_of_files_too(cli: Cli) -> None:
    """A shell makes them of `*`."""
    for arguments in (
        (f"--{EVIL}",),
        ("device", "apply", EVIL, "--store", "/nowhere"),
        ("packet", "inspect", EVIL),
        (EVIL,),
    ):
        result = cli(*arguments)
        assert result.code in (2, 3)
        harmless(result.err)


def test_events_and_status_are_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLog().emit(logging.LogRecord("x", logging.WARNING, "", 0, "%s", (EVIL,), None))
    err = capsys.readouterr().err
    harmless(err)
    assert json.loads(err)["message"] == EVIL


def test_an_exception_in_a_log_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("sdlora_edge.of_a_test")
    log.addHandler(handler := JsonLog())
    try:
        raise ValueError("what happened" + "!" * 5000)
    except ValueError:
        log.exception("POST /v1/predict failed")
    finally:
        log.removeHandler(handler)
    told = json.loads(capsys.readouterr().err)
    assert (told["level"], told["message"]) == ("error", "POST /v1/predict failed")
    assert "!!!" in told["traceback"]
    assert len(told["traceback"]) <= 1500


def test_names_in_an_archive(cli: Cli, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", ["a", "b", "c", "d"], 4)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(data.rglob("*.png")):
            archive.write(path, path.relative_to(data))
        archive.writestr(f"a/{EVIL[:-1]}.png", b"no image")
    base = (
        "--backbone",
        "micro_vit",
        "--base-classes",
        2,
        "--tasks",
        1,
        "--epochs",
        1,
        "--image-size",
        16,
    )
    result = cli("train", "--data", tmp_path / "data.zip", *base, "--out", tmp_path / "run")
    assert result.code == 0, result
    assert "forged" in result.err
    harmless(result.out)
    harmless(result.err)


def test_a_progress_bar_moves() -> None:
    stream = io.StringIO()
    for text in ("\rtask 1: 50%", "\n", "\x1b[A", "\n\x1b[A\x1b[A", "\rtask\r2"):
        Escaping(stream).write(text)
    assert stream.getvalue() == "\rtask 1: 50%\n\x1b[A\n\x1b[A\x1b[A\rtask\\r2"


def test_what_a_terminal_cannot_show_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "Käse.sdlora"
    command = [sys.executable, "-m", "sdlora_edge", "packet", "inspect", str(file)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"K\\xe4se.sdlora: No such file" in done.stderr


def test_a_log_that_takes_nothing_changes_no_exit_code(store: Path) -> None:
    """Not at the end of Python either, which would write again what is left."""
    for arguments, code in (
        (("status", "--store", str(store)), 0),
        (("status", "--store", "/nowhere"), 3),
    ):
        command = [sys.executable, "-m", "sdlora_edge", "device", *arguments]
        with open("/dev/full", "w") as full:
            assert (
                subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False).returncode
                == code
            )


def test_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with terminal():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before

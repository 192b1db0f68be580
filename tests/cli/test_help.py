"""Help pages: fast, complete in a pipe, drawn on a terminal; one spelling for one thing."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Result

from sdlora_edge.cli import COMPLETE, app, arguments, reference
from sdlora_edge.device.answers import BATCH
from sdlora_edge.formats import signing
from sdlora_edge.formats.encoding import ENCODINGS

Cli = Callable[..., Result]
HEAVY = ("numpy", "PIL", "onnxruntime", "cryptography", "securesystemslib", "safetensors", "torch")


def commands(
    group: Any = None, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, each with the words that call it."""
    group = group or typer.main.get_command(app)
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = dict(commands())


def parameters() -> Iterator[tuple[str, Any]]:
    for words, command in COMMANDS.items():
        for parameter in command.params:
            yield " ".join(words), parameter


def test_help_loads_nothing_that_is_slow() -> None:
    lines = [[*words, "--help"] for words in COMMANDS]
    program = (
        "import sys; from sdlora_edge.cli import main\n"
        f"for line in {lines!r}: assert main(line) == 0, line\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_in_a_pipe_help_is_plain_and_complete(cli: Cli, words: tuple[str, ...]) -> None:
    shown = cli(*words, "-h")
    assert shown == cli(*words, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.isascii()
    assert max(map(len, shown.out.splitlines())) <= 80
    assert not re.search("<(str|int|float|path|list)", shown.out), "a value has no metavar"
    for parameter in COMMANDS[words].params:
        for name in parameter.opts if parameter.param_type_name == "option" else ():
            assert name in shown.out
    for name in getattr(COMMANDS[words], "commands", {}):
        assert f"\n  {name} " in shown.out


def test_help_texts_hold_no_markup() -> None:
    """On a terminal, rich would read `[host]` as a style."""
    for words, command in COMMANDS.items():
        assert "[" not in (command.help or ""), words
    for words, parameter in parameters():
        assert "[" not in (parameter.help or ""), (words, parameter.name)
        assert parameter.help, (words, parameter.name)


ARGUMENTS = ("PACKET", "IMAGE", "FOLDER", "ADAPTER", "NAME", "FILE", "ROLE")


def test_one_thing_has_one_spelling() -> None:
    spelled = {
        "run": (["--run"], "RUN"),
        "bundle": (["--bundle"], "BUNDLE"),
        "store": (["--store"], "STORE"),
        "key": (["--key"], "KEY"),
        "after": (["--after"], "PACKET"),
        "out": (["--out"], None),
        "as_json": (["--json"], None),
        "max_megapixels": (["--max-megapixels"], None),
    }
    for words, parameter in parameters():
        if parameter.name in spelled:
            options, metavar = spelled[parameter.name]
            assert parameter.opts == options, words
            assert metavar in (None, parameter.metavar), words
        if parameter.param_type_name == "argument":
            assert parameter.metavar in ARGUMENTS, words


def test_what_help_repeats_is_what_holds() -> None:
    (batch,) = (
        p for words, p in parameters() if (words, p.name) == ("device predict", "batch_size")
    )
    assert batch.default == BATCH
    assert arguments.PASSPHRASE == signing.PASSPHRASE
    assert "|".join(ENCODINGS) == arguments.ENCODINGS


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        (("device", "aply"), "'apply'"),
        (("exprt",), "'export'"),
        (("packet", "build", "--bundel", "x"), "--bundle"),
    ],
)
def test_a_typing_error_is_told_what_was_meant(cli: Cli, line: tuple[str, ...], meant: str) -> None:
    result = cli(*line)
    assert result.code == 2
    assert meant in result.err


def test_a_group_alone_shows_its_commands(cli: Cli) -> None:
    result = cli("device")
    assert (result.code, result.out) == (2, "")
    assert "  predict " in result.err


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal of 80 columns gets."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sdlora_edge", *arguments]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    env.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += (read := os.read(ours, 10_000))
            except OSError:  # how Linux says that nobody has the other end any more
                break
            if not read:
                break
    os.close(ours)
    assert process.returncode in (0, 2, 3)
    return shown.decode()


def test_a_terminal_gets_panels_and_colours() -> None:
    shown = on_a_terminal("packet", "build", "--help")
    assert "╭─" in shown
    assert "\x1b[" in shown
    assert "\\u001b" not in shown
    error = on_a_terminal("packet", "inspect", "/nowhere.sdlora")
    assert "\x1b[1;31merror\x1b[0m: /nowhere.sdlora" in error
    assert "\x1b" not in on_a_terminal("packet", "build", "--help", TERM="dumb")
    assert "╭" not in on_a_terminal("packet", "build", "--help", TERM="dumb")
    assert "\x1b[1;3" not in on_a_terminal("packet", "build", "--help", NO_COLOR="1")


def test_a_shell_completes_commands_options_and_files() -> None:
    def complete(line: str, instruction: str = "complete_bash") -> list[str]:
        env = {
            **os.environ,
            COMPLETE: instruction,
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        }
        command = [sys.executable, "-m", "sdlora_edge"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return [line for line in done.stdout.splitlines() if line]

    assert "train" in complete("sdlora-edge tr")
    assert complete("sdlora-edge device ap") == ["apply"]
    assert "--bundle" in complete("sdlora-edge packet build --bu")
    for line in ("packet inspect ", "packet build --bundle ", "device apply x"):
        assert complete(f"sdlora-edge {line}") == []  # then the shell names files
    script = "\n".join(complete("", "source_bash"))
    assert "complete -o default" in script


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
    assert page.read_text() == reference.page(), (
        "run python -m sdlora_edge.cli.reference > docs/reference/cli.md"
    )

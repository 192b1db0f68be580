"""Encrypted keys: how a passphrase is asked for, and that it appears nowhere."""

from __future__ import annotations

import getpass
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Fleet, Result
from sdlora_edge.export.bundles import export_bundle

from sdlora_edge.formats.signing import PASSPHRASE
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]
SECRET = "correct horse battery"  # noqa: S105


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user types, entry by entry."""
    entries: list[str] = []
    monkeypatch.setattr(getpass, "getpass", lambda prompt: entries.pop(0))
    return entries


def new(cli: Cli, folder: Path, *arguments: object) -> Result:
    result = cli("keys", "new", "a", "--out", folder, *arguments)
    assert SECRET not in result.out + result.err
    return result


def is_encrypted(folder: Path) -> bool:
    return "ENCRYPTED" in (folder / "a.key").read_text()


def test_a_new_key_is_encrypted_with_what_was_typed_twice(
    cli: Cli, typed: list[str], tmp_path: Path
) -> None:
    typed[:] = [SECRET, "another horse battery"]
    assert new(cli, tmp_path / "keys", "--passphrase").code == 2
    assert not (tmp_path / "keys").exists()
    typed[:] = [SECRET, SECRET]
    assert json.loads(new(cli, tmp_path / "keys", "--passphrase", "--json").out)["encrypted"]
    assert not typed
    assert is_encrypted(tmp_path / "keys")


def test_a_new_keys_passphrase_comes_from_a_file_or_the_variable(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    assert new(cli, tmp_path / "1", "--passphrase-file", tmp_path / "secret").code == 0
    assert new(cli, tmp_path / "none", "--passphrase-file", tmp_path / "nothing").code == 3
    monkeypatch.setenv(PASSPHRASE, SECRET)
    assert new(cli, tmp_path / "2", "--passphrase").code == 0
    assert new(cli, tmp_path / "3").code == 0
    assert [is_encrypted(tmp_path / name) for name in "123"] == [True, True, False]
    for name in "12":
        assert cli(
            "packet", "sign", tmp_path / "none", "--key", tmp_path / name / "a.key"
        ).err.startswith(f"error: {tmp_path}/none")
    monkeypatch.setenv(PASSPHRASE, "short")
    assert new(cli, tmp_path / "4", "--passphrase").code == 2


def test_a_terminal_does_not_show_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "sdlora_edge",
        "keys",
        "new",
        "a",
        "--passphrase",
        "--out",
        str(tmp_path / "keys"),
    ]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        shown = b""
        for prompt in (b"new passphrase of a: ", b"the same again: "):
            while prompt not in shown:
                shown += os.read(ours, 1000)
            os.write(ours, SECRET.encode() + b"\n")
        while b"messages" not in shown:
            shown += os.read(ours, 1000)
        assert process.wait() == 0
    os.close(ours)
    assert SECRET.encode() not in shown
    assert is_encrypted(tmp_path / "keys")


def test_every_command_that_signs_opens_an_encrypted_key(
    cli: Cli, fleet: Fleet, typed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed[:] = [SECRET, SECRET]
    assert new(cli, tmp_path, "--passphrase").code == 0
    key, bundle = tmp_path / "a.key", tmp_path / "bundle"
    export_bundle(
        Run.open(fleet.run),
        bundle,
        0,
        [str(tmp_path / "a.pub"), str(fleet.key.with_suffix(".pub"))],
    )
    shutil.copy(fleet.packets[0], tmp_path / "again.sdlora")
    out = [tmp_path / f"{i}.sdlora" for i in range(3)]
    commands: list[tuple[object, ...]] = [
        ("build", "--run", fleet.run, "--bundle", bundle, "--out", tmp_path / "packets"),
        ("sign", tmp_path / "again.sdlora"),
        ("squash", *fleet.packets, "--trust", fleet.key.with_suffix(".pub"), "--out", out[0]),
        ("trust", "--bundle", bundle, "--remove", fleet.key.with_suffix(".pub"), "--out", out[1]),
        ("revoke", "--bundle", bundle, "--task", 1, "--out", out[2]),
    ]
    for command in commands:
        typed[:] = ["wrong horse battery"]
        result = cli("packet", *command, "--key", key)
        assert (result.code, "cannot be decrypted" in result.err, result.err.count("\n")) == (
            3,
            True,
            1,
        ), (command, result)
        assert "wrong horse" not in result.err
    assert not (tmp_path / "packets").exists()
    assert not any(path.exists() for path in out)
    typed[:] = [SECRET] * 5
    for command in commands:
        assert cli("packet", *command, "--key", key).code == 0, command
    assert not typed
    monkeypatch.setenv(PASSPHRASE, SECRET)
    assert (
        cli("packet", *commands[1], "--key", key).code == 7
    )  # signed already: the variable was enough


def test_without_a_terminal_the_variable_is_named(fleet: Fleet, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != PASSPHRASE} | {
        PASSPHRASE: SECRET
    }
    command = [
        sys.executable,
        "-m",
        "sdlora_edge",
        "keys",
        "new",
        "a",
        "--out",
        str(tmp_path),
        "--passphrase",
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    shutil.copy(fleet.packets[0], tmp_path / "p.sdlora")
    sign = [
        *command[:3],
        "packet",
        "sign",
        str(tmp_path / "p.sdlora"),
        "--key",
        str(tmp_path / "a.key"),
    ]
    del environment[PASSPHRASE]
    options = {
        "input": SECRET + "\n",
        "capture_output": True,
        "text": True,
        "start_new_session": True,
    }
    done = subprocess.run(sign, env=environment, check=False, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no passphrase was given: use a terminal, or set {PASSPHRASE}\n"


def test_a_passphrase_is_asked_for_after_everything_else_is_checked(
    cli: Cli, fleet: Fleet, typed: list[str], tmp_path: Path
) -> None:
    """Nobody types a passphrase for a command that cannot work."""
    typed[:] = [SECRET, SECRET]
    assert new(cli, tmp_path, "--passphrase").code == 0
    out, none = tmp_path / "new.sdlora", tmp_path / "none.sdlora"
    for command in (
        ("build", "--run", tmp_path, "--bundle", fleet.bundle),
        ("build", "--run", fleet.run, "--bundle", tmp_path),
        ("build", "--run", fleet.run, "--bundle", fleet.bundle, "--task", 9),
        ("build", "--run", fleet.run, "--bundle", fleet.bundle, "--after", none),
        ("sign", none),
        ("squash", fleet.packets[0], "--out", out),
        ("trust", "--bundle", fleet.bundle, "--threshold", 9, "--out", out),
        ("revoke", "--bundle", fleet.bundle, "--task", 0, "--out", out),
    ):
        # `typed` is empty: a question would be an IndexError, which is exit code 1
        assert cli("packet", *command, "--key", tmp_path / "a.key").code in (2, 3), command

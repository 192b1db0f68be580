"""Whatever a command writes, it writes outside stores, and in place of files alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from conftest import Fleet, Result, snapshot

from sdlora_edge.cli import app
from sdlora_edge.cli.output import output

Cli = Callable[..., Result]
INPUTS = {
    *("adapter", "after", "bundle", "check", "config", "expected"),
    *("folder", "images", "packet", "page", "packets", "passphrase_file", "run"),
    *(
        "ca",
        "client_ca",
        "client_cert",
        "client_key",
        "files",
        "fleet_root",
        "key",
        "online_keys",
        "root",
    ),
    *("socket", "tls_cert", "tls_key", "token_file", "watch"),
}


@dataclass(frozen=True)
class Parameter:
    """A path that a command takes."""

    command: tuple[str, ...]
    name: str
    is_output: bool

    @property
    def is_own_store(self) -> bool:
        """The store that a device command works on, or the repository and keys of a fleet command."""
        own = {"device": ("store",), "fleet": ("repository", "keys")}.get(self.command[0], ())
        return self.name in own and self.command[1] not in ("init", "selftest")

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def __str__(self) -> str:
        return " ".join((*self.command, self.option))


def parameters(group: typer.Typer = app, words: tuple[str, ...] = ()) -> Iterator[Parameter]:
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from parameters(inner.typer_instance, (*words, str(inner.name)))
    for command in group.registered_commands:
        assert command.callback is not None
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            if "pathlib.Path" in str(hint):
                told = getattr(hint, "__metadata__", ())
                own = command.name or command.callback.__name__
                yield Parameter(
                    (*words, own),
                    name,
                    any(getattr(info, "callback", None) is output for info in told),
                )


OUTPUTS = [parameter for parameter in parameters() if parameter.is_output]


def test_every_path_is_an_input_or_an_output() -> None:
    for parameter in parameters():
        known = parameter.name in INPUTS or parameter.is_own_store
        assert known != parameter.is_output, (
            f"{parameter}: give its option callback=output, or name it in INPUTS"
        )
    assert len(OUTPUTS) >= 16


@pytest.mark.parametrize("parameter", OUTPUTS, ids=str)
def test_no_output_lies_in_a_store(
    cli: Cli, store: Path, tmp_path: Path, parameter: Parameter
) -> None:
    (tmp_path / "link").symlink_to(store / "packets")
    before = snapshot(store)
    for inside in (
        store / "generation.0.json",
        store / "bundle" / "model.onnx",
        store / "new",
        store,
        tmp_path / "link" / "x.sdlora",
    ):
        result = cli(*parameter.command, parameter.option, inside)
        assert result.code == 2, result
        assert "lies in the store" in result.err
    assert snapshot(store) == before


@pytest.mark.parametrize("parameter", OUTPUTS, ids=str)
def test_an_output_replaces_no_link_and_no_device(
    cli: Cli, tmp_path: Path, parameter: Parameter
) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for odd in ("link", "pipe"):
        result = cli(*parameter.command, parameter.option, tmp_path / odd)
        assert (result.code, "never replaced" in result.err) == (2, True), result


def test_a_packet_in_a_store_is_not_signed_again(cli: Cli, fleet: Fleet, store: Path) -> None:
    """`sign` without --out writes the packet itself."""
    assert cli("device", "apply", fleet.packets[0], "--store", store).code == 0
    (packet,) = (store / "packets").iterdir()
    before = snapshot(store)
    result = cli("packet", "sign", packet, "--key", fleet.key)
    assert (result.code, "lies in the store" in result.err) == (2, True), result
    assert snapshot(store) == before

"""The device's core install has nothing of the fleet, and says what to install when it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import Fleet

from sdlora_edge.cli import app
from sdlora_edge.train.config import tomllib

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "tuf": "tuf",
    "urllib3": "urllib3",
    "paho-mqtt": "paho",
    "cryptography": "cryptography",
    "sqlalchemy": "sqlalchemy",
    "alembic": "alembic",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "jinja2": "jinja2",
    "prometheus-client": "prometheus_client",
    "python-multipart": "python_multipart",
}
"""The module of each package of the extras `agent` and `fleet`."""
OWN = {"device sync", "device configure"}
"""Commands of the device that belong to the fleet, beside those with `--from`."""
URL = "http://127.0.0.1:9/"
WITHOUT = f"""
import json, sys
for name in {sorted(MODULES.values())!r}:
    sys.modules[name] = None
import contextlib, io
from sdlora_edge.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        code = main(words)
    found.append((words, code, out.getvalue()))
print(json.dumps(found))
"""


def test_the_modules_are_those_of_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {text.split(">")[0] for extra in ("agent", "fleet") for text in extras[extra]}
    assert names - {"sdlora-edge[agent]"} == MODULES.keys()


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(its words, itself) of each command."""
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(path), command
        return
    for name, child in below.items():
        yield from leaves(child, (*path, name))


def is_from(parameter: Any) -> bool:
    return "--from" in parameter.opts and parameter.name != "json"


def is_number(parameter: Any) -> bool:
    """Of click's parameters, and of those that newer releases of typer have."""
    kind = getattr(parameter, "type", None)
    name = kind.name if kind else getattr(parameter.type_descriptor.annotation, "__name__", "")
    return str(name).startswith(("int", "float"))


def words(path: str, command: Any, places: dict[str, Path]) -> list[str]:
    """A call of a command with all that it requires."""
    called = path.split()
    if called[-1] == "init":
        places = places | {"store": places["store"].with_name("new")}
    for parameter in command.params:
        name = parameter.name.lower()
        if not (parameter.required or is_from(parameter)):
            continue
        value = "1" if is_number(parameter) else str(places.get(name, places["file"]))
        if is_from(parameter) or "url" in name or name in ("source", "from_"):
            value = URL
        called += [value] if parameter.param_type_name == "argument" else [parameter.opts[0], value]
    return called


def called_without(calls: list[list[str]]) -> list[tuple[list[str], int, str]]:
    """(words, exit code, output) of each, in one process that has nothing of the extras."""
    command = [sys.executable, "-c", WITHOUT, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def test_the_core_install_serves_updates_and_watches(fleet: Fleet, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    (tmp_path / "incoming").mkdir()
    calls = [
        ["device", "init", "--bundle", str(fleet.bundle), *store],
        ["device", "apply", str(fleet.packets[0]), *store],
        ["device", "watch", str(tmp_path / "incoming"), "--once", *store],
        ["device", "rollback", *store],
        ["device", "status", *store],
        ["device", "verify", *store],
        ["packet", "verify", str(fleet.packets[0]), "--bundle", str(fleet.bundle)],
        ["--help"],
        ["device", "--help"],
    ]
    for call, code, output in called_without(calls):
        assert code == 0, f"{call}: {output}"


def test_a_command_of_the_fleet_says_what_to_install(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    places = {"file": fleet.packets[0], "store": store, "bundle": fleet.bundle}
    commands = dict(leaves(typer.main.get_command(app)))
    hosts = {path for path in commands if path.startswith("fleet ")}
    devices = {
        p for p in commands if p.startswith("device ") and any(map(is_from, commands[p].params))
    }
    devices |= OWN & commands.keys()
    if not hosts | devices:
        pytest.skip("there are no commands of the fleet")
    for extra, paths in (("fleet", hosts), ("agent", devices)):
        calls = [words(path, commands[path], places) for path in sorted(paths)]
        for call, code, output in called_without(calls):
            assert code == 2, f"{call}: {code} {output}"
            assert f"pip install 'sdlora-edge[{extra}]'" in output, f"{call}: {output}"

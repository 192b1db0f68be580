"""The options of `train` are those of the settings, and its page is made of them."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Optional

import pytest
import typer
from typer.testing import CliRunner

from sdlora_edge.cli.options import with_settings
from sdlora_edge.cli.output import Table
from sdlora_edge.cli.train import ROW_HEADS, accuracy_row, class_changes, header
from sdlora_edge.errors import UsageError
from sdlora_edge.train import splits
from sdlora_edge.train.settings import SETTINGS, Settings
from sdlora_edge.train.source import SeedSplit

ROOT = Path(__file__).resolve().parents[2]


def given(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the flags that a command with the options of all settings gets."""
    app = typer.Typer()

    @app.command()
    @with_settings
    def command(
        flags: dict[str, Any], own: Annotated[Optional[int], typer.Option()] = None
    ) -> None:
        print(json.dumps(flags | {"own": own}))

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, json.loads(result.stdout) if result.exit_code == 0 else {}


def test_every_setting_has_a_flag_of_its_type() -> None:
    values: dict[str, Any] = {}
    arguments = []
    for name, setting in SETTINGS.items():
        value: Any = setting.default
        if setting.choices:
            value = setting.choices[-1]
        elif setting.kind is bool:
            value = True
        elif setting.kind is tuple:
            value = [0.25, 0.5, 1.0]
        elif not value and setting.kind is str:
            value = "text"
        values[name] = value
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        arguments += [setting.flag] if value is True else [setting.flag, shown]
    assert given("--own", "3", *arguments) == (0, values | {"own": 3})


def test_a_flag_that_is_not_given_is_not_a_setting() -> None:
    assert given() == (0, {"own": None})
    assert given("--no-strict") == (0, {"own": None, "strict": False})


def test_one_number_stands_for_three() -> None:
    code, flags = given("--mean", "0.5")
    assert Settings.of(mean=flags["mean"]).backbone.mean == (0.5, 0.5, 0.5)
    assert code == 0


@pytest.mark.parametrize(
    "arguments", [("--head", "none"), ("--epochs", "ten"), ("--lr",), ("--mean", "a,b,c")]
)
def test_values_of_another_type_are_refused(arguments: tuple[str, ...]) -> None:
    assert given(*arguments)[0] != 0


def test_help_names_every_flag_with_its_default() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdlora_edge", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "TERM": "dumb"},
    )
    text = re.sub(r"[\s│]+", " ", done.stdout)
    for setting in SETTINGS.values():
        assert f" {setting.flag} " in text
        assert setting.help.split(". ")[0][:40] in text
    assert "Default: 1993." in text
    assert "--retire" in text
    assert "--rename" in text


def test_the_page_of_the_settings_is_up_to_date() -> None:
    found = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
    assert found["PAGE"].read_text() == found["rendered"](), "run python docs/configuration.py"


def test_a_row_of_the_result_stands_under_its_heads() -> None:
    entry = {
        "task": 2,
        "name": "two",
        "classes": ["c", "d", "e"],
        "seconds": 7.25,
        "correct": [[8], [7, 12]],
        "totals": [10, 15],
        "accuracy": [0.8, 0.76],
    }
    row = accuracy_row(SimpleNamespace(metrics=[entry]))  # type: ignore[arg-type]
    assert row == "   2 two                    3      7.2          25  76.0 | 70.0 80.0"
    for word, end in (
        ("classes", "3"),
        ("seconds", "7.2"),
        ("tested", "25"),
        ("all %", "76.0"),
    ):
        assert row[: ROW_HEADS.index(word) + len(word)].endswith(f" {end}")


def test_the_header_says_what_is_trained() -> None:
    source = splits.load("digits", SeedSplit(0.3, 1993))
    (found,) = header(Settings.of(device="cpu"), source)
    assert isinstance(found, Table)
    assert dict(found.rows) == {
        "model": "micro_vit",
        "device": "cpu",
        "classes": "10",
        "images": "1258 for training, 539 for testing, from digits",
        "tasks": "3",
    }


def test_classes_to_retire_and_rename_are_read() -> None:
    found = class_changes(["a", "b", "a"], ["c=d", "e=f=g"])
    assert (found.retired, found.renamed) == (("a", "b"), {"c": "d", "e": "f=g"})
    assert class_changes(["e\u0301"], None).retired == ("\u00e9",)
    assert not class_changes(None, None)
    for wrong in ("c", "=d", "c="):
        with pytest.raises(UsageError, match="write OLD=NEW"):
            class_changes([], [wrong])
    with pytest.raises(UsageError, match="twice"):
        class_changes([], ["c=d", "c=e"])

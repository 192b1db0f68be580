"""Settings: every number has bounds, every key has a type and a table, every message a name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdlora_edge.errors import UsageError
from sdlora_edge.formats.encoding import DEFAULT, ENCODINGS
from sdlora_edge.formats.limits import LIMITS
from sdlora_edge.train import config
from sdlora_edge.train.config import resolve, to_toml
from sdlora_edge.train.presets import preset
from sdlora_edge.train.settings import GROUPS, SETTINGS, Settings

NAN, INF = float("nan"), float("inf")
ODD: dict[type, tuple[Any, ...]] = {
    int: (NAN, INF, -INF, -1, 10**400, 1.5, "1", True, None, [1], {"a": 1}),
    float: (NAN, INF, -INF, -1e9, 10**400, "1", True, None, [1.0], {"a": 1}),
}
BOUND = [name for name, setting in SETTINGS.items() if setting.bound]


@pytest.mark.parametrize("name", BOUND)
def test_a_number_out_of_bounds_or_of_another_kind_is_refused_by_its_name(name: str) -> None:
    kind = SETTINGS[name].kind
    wrong = [[v, 0.5, 0.5] for v in ODD[float]] if kind is tuple else ODD[kind]
    for value in wrong:
        with pytest.raises(UsageError, match=rf"^{name} is .*: it must be "):
            Settings().changed(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 2**32},
        {"std": [0.5, 0, 0.5]},
        {"rank": 10**9},
        {"rank": "9" * 5000},
        {"rank": 10.5},
        {"rank": "10,9999@2"},
        {"tensorboard": 1},
        {"compile": "yes"},
        {"data": 3},
        {"mean": "0.5"},
        {"mean": {"r": 1}},
        {"magnitude_init": 1e5},
        {"absorb": 1.5},
        {"head": "none"},
    ],
)
def test_values_that_make_no_sense_are_refused_by_their_name(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=rf"^{next(iter(values))} is "):
        Settings().changed(**values)


def test_a_path_is_a_text() -> None:
    made = Settings.of(data=Path("images"), weights=Path("w.safetensors"))
    assert (made.data.data, made.backbone.weights) == ("images", "w.safetensors")
    with pytest.raises(UsageError, match=r"^tasks is '2': it must be a whole number$"):
        Settings.of(tasks=Path("2"))


def test_every_setting_is_declared_whole() -> None:
    for name, setting in SETTINGS.items():
        assert (setting.kind in (int, float, tuple)) == bool(setting.bound), name
        assert setting.help.endswith("."), name
        assert bool(setting.metavar) == (not setting.choices and setting.kind is not bool), name
        setting.check(setting.default)
    assert list(Settings().flat()) == list(SETTINGS)


def test_numbers_that_stand_elsewhere_too_are_the_same() -> None:
    """The settings import no numpy, so they repeat these."""
    assert SETTINGS["encoding"].choices == ENCODINGS
    assert SETTINGS["encoding"].default == DEFAULT
    assert SETTINGS["magnitude_init"].bound is not None
    assert SETTINGS["magnitude_init"].bound.high == LIMITS.magnitude


def test_the_ends_of_the_bounds_are_taken() -> None:
    found = Settings().changed(
        seed=2**32 - 1, mean=[0, 0, 0], std=[1, 1, 1], absorb=1, lr=1e-9, tasks=1.0, rank=4096
    )
    assert (found.training.seed, found.data.tasks, found.method.absorb) == (2**32 - 1, 1, 1.0)
    assert found.backbone.mean == (0.0, 0.0, 0.0)


def test_toml_reaches_no_number_that_a_flag_does_not(tmp_path: Path) -> None:
    for text, name in (
        ("[data]\ntasks = inf", "tasks"),
        ("[training]\nlr = nan", "lr"),
        ("[backbone]\nmean = [nan, 0.5, 0.5]", "mean"),
        ("[training]\nepochs = 2026-01-01", "epochs"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(UsageError, match=f"^{name} is"):
            resolve(tmp_path / "c.toml", {})


def test_an_unknown_key_or_preset_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown setting epoch: did you mean epochs"):
        Settings().changed(epoch=3)
    with pytest.raises(UsageError, match="unknown setting zzz: known are data, "):
        Settings().changed(zzz=3)
    with pytest.raises(UsageError, match="did you mean imagenet-r-10"):
        preset("imagnet-r-10")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = 0.1", r"lr belongs in the table \[training\]"),
        ('data = "images"', r"data stands outside any table: write it below \[data\]"),
        ("training = 3", r"training must be a table: write \[training\]"),
        ("[data]\nlr = 0.1", r"\[data\] lr belongs in the table \[training\]"),
        ("[trainin]\nlr = 0.1", "unknown setting trainin"),
        ("[training]\nepoch = 1", "did you mean epochs"),
    ],
)
def test_a_key_outside_its_table_gets_an_error_that_names_the_table(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        resolve(tmp_path / "c.toml", {})


def test_the_file_of_a_run_serves_as_config(tmp_path: Path) -> None:
    written = to_toml(Settings().changed(epochs=3, mean=[0, 0.5, 1]))
    (tmp_path / "c.toml").write_text(written + '\n[recorded]\ntorch = "2"\n')
    assert resolve(tmp_path / "c.toml", {"base_classes": 0}).training.epochs == 3
    assert config.load(tmp_path / "c.toml").backbone.mean == (0.0, 0.5, 1.0)
    assert config.recorded_in(tmp_path / "c.toml") == {"torch": "2"}
    assert all(f"[{group}]" in written for group in GROUPS)
    assert all(f"# {setting.help}\n{name} = " in written for name, setting in SETTINGS.items())


def test_settings_import_nothing_heavy() -> None:
    program = (
        "import sys, sdlora_edge.train.settings; print(*(m for m in sys.modules if '.' not in m))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"numpy", "PIL", "torch", "cryptography", "onnxruntime"} & {*done.stdout.split()}

"""Settings: every number has bounds, every key has a kind, and a message names the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora_edge.errors import UsageError
from sdlora_edge.train import config
from sdlora_edge.train.config import BOUNDS, TrainConfig, from_values, resolve
from sdlora_edge.train.presets import preset

NAN, INF = float("nan"), float("inf")
ODD = {
    int: (NAN, INF, -INF, -1, 10**400, 1.5, "1", True, None, [1], {"a": 1}),
    float: (NAN, INF, -INF, -1e9, 10**400, "1", True, None, [1.0], {"a": 1}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_out_of_bounds_or_of_another_kind_is_refused_by_its_name(name: str) -> None:
    kind = type(TrainConfig.__dataclass_fields__[name].default)
    wrong = [[v, 0.5, 0.5] for v in ODD[float]] if kind is tuple else ODD[kind]
    for value in wrong:
        with pytest.raises(UsageError, match=rf"^{name} is .*: it must be "):
            from_values({name: value})


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
    ],
)
def test_values_that_make_no_sense_are_refused_by_their_name(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=rf"^{next(iter(values))} is "):
        from_values(values)


def test_every_number_has_bounds_and_every_default_lies_in_them() -> None:
    fields = TrainConfig.__dataclass_fields__.values()
    assert {
        f.name for f in fields if type(f.default) in (int, float) or f.name in ("mean", "std")
    } == set(BOUNDS)


def test_the_ends_of_the_bounds_are_taken() -> None:
    found = from_values(
        {
            "seed": 2**32 - 1,
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "absorb": 1,
            "lr": 1e-9,
            "tasks": 1.0,
            "rank": 4096,
        }
    )
    assert (found.seed, found.tasks, found.absorb, found.mean) == (
        2**32 - 1,
        1,
        1.0,
        (0.0, 0.0, 0.0),
    )


def test_toml_reaches_no_number_that_a_flag_does_not(tmp_path: Path) -> None:
    for text, name in (
        ("tasks = inf", "tasks"),
        ("lr = nan", "lr"),
        ("mean = [nan, 0.5, 0.5]", "mean"),
        ("epochs = 2026-01-01", "epochs"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(UsageError, match=f"^{name} is"):
            resolve(tmp_path / "c.toml", {})


def test_an_unknown_key_or_preset_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown setting epoch: did you mean epochs"):
        from_values({"epoch": 3})
    with pytest.raises(UsageError, match="unknown setting zzz: known are data, "):
        from_values({"zzz": 3})
    with pytest.raises(UsageError, match="did you mean imagenet-r-10"):
        preset("imagnet-r-10")


def test_the_file_of_a_run_serves_as_config(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        TrainConfig(epochs=3).to_toml() + '\n[recorded]\ntorch = "2"\n'
    )
    assert resolve(tmp_path / "c.toml", {}).epochs == 3
    assert config.recorded_in(tmp_path / "c.toml") == {"torch": "2"}

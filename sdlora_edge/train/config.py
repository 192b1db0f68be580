"""The settings of a run: defaults, then a TOML file, then flags; the resolved ones are saved in the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from .. import files
from ..errors import InputError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIGITS = "digits"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `sdlora-edge train`; the keys of its TOML file.

    data: "digits" (built in), or a folder or ZIP of pictures, one folder per class. tasks: cut the classes into so many.
    base_classes: that many of them are learned first, by plain training of the whole backbone, which is then frozen (for a
    backbone without pre-trained weights). weights: a safetensors file; empty means timm's own download. image_size 0: the
    backbone's own. mean, std: empty means the backbone's own. head_lr_factor: the head's share of lr (features are long
    vectors: at the full rate a head overshoots). magnitudes: "carry" or "reset". head: "paper" (a row is trained with its
    task) or "aligned" (all rows are fitted again after each task, `method.head`). device: auto, cpu, cuda.
    """

    data: str = DIGITS
    tasks: int = 5
    base_classes: int = 0
    base_epochs: int = 40
    test_fraction: float = 0.2
    backbone: str = "vit_tiny_patch16_224"
    weights: str = ""
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rank: int = 10
    epochs: int = 10
    lr: float = 0.02
    head_lr_factor: float = 0.1
    optimizer: str = "sgd"
    batch_size: int = 64
    magnitudes: str = "carry"
    magnitude_init: float = 1.0
    head: str = "paper"
    device: str = "auto"
    seed: int = 1993

    def __post_init__(self) -> None:
        for name, low in {
            "tasks": 1,
            "rank": 1,
            "epochs": 1,
            "batch_size": 1,
            "base_classes": 0,
            "image_size": 0,
            "seed": 0,
        }.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least {low}")
        if not 0 < self.test_fraction < 1:
            raise UsageError(f"test_fraction is {self.test_fraction}: it must lie between 0 and 1")
        for name in ("lr", "head_lr_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be above 0")
        choices = {
            "magnitudes": ("carry", "reset"),
            "head": ("paper", "aligned"),
            "device": ("auto", "cpu", "cuda"),
            "optimizer": ("sgd", "adam", "adamw"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(allowed)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise UsageError(f"{name} must be three numbers, such as 0.5,0.5,0.5")

    def to_toml(self) -> str:
        return tomli_w.dumps({name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()})


DIGITS_DEFAULTS: dict[str, Any] = {
    "tasks": 3,
    "base_classes": 4,
    "backbone": "micro_vit",
    "image_size": 16,
    "test_fraction": 0.3,
    "rank": 4,
    "lr": 0.01,
    "head": "aligned",
}
"""What differs for the embedded default, whose whole run takes well under two minutes on two cores."""


def resolve(file: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Flags win over the file, the file over the defaults; a flag that is None was not given.

    Raises InputError for a file that is no TOML, UsageError for an unknown key or a value out of range.
    """
    values = _read(file) if file else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if values.get("data", DIGITS) == DIGITS:
        values = DIGITS_DEFAULTS | values
    return from_values(values)


def load(path: Path) -> TrainConfig:
    """The resolved settings of a run."""
    return from_values(_read(path))


def from_values(values: Mapping[str, Any]) -> TrainConfig:
    kinds = {f.name: type(f.default) for f in fields(TrainConfig)}
    if unknown := set(values) - set(kinds):
        raise UsageError(f"unknown setting {', '.join(sorted(unknown))}: known are {', '.join(kinds)}")
    try:
        return TrainConfig(**{name: _cast(kinds[name], value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UsageError(f"a setting is of the wrong kind: {error}") from error


def _cast(kind: type, value: Any) -> Any:
    if kind is tuple:
        return tuple(float(v) for v in value)
    if isinstance(value, bool) or (kind is int and int(value) != value) or isinstance(value, str) != (kind is str):
        raise ValueError(f"{value!r} is not of kind {kind.__name__}")
    return kind(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(files.read(path, 1 << 20).decode())
    except ValueError as error:
        raise InputError(f"{path} is not a TOML file: {error}") from error

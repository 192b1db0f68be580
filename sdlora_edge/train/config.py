"""The settings of a run: defaults, then a TOML file, then flags; the resolved ones are saved in the run."""

from __future__ import annotations

import difflib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from ..errors import InputError, UsageError
from ..formats.container import LIMITS
from ..formats.encoding import DEFAULT, ENCODINGS
from ..inputs.image import MAX_PIXELS, PILLOW_MAX_PIXELS
from ..storage import atomic

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIGITS, RECORDED = "digits", "recorded"


CHOICES = {
    "protocol": ("class", "domain"),
    "augment": ("none", "flip", "crop", "flip-crop"),
    "method": ("sdlora", "lora", "frozen"),
    "directions": ("free", "shared"),
    "magnitudes": ("carry", "reset", "fixed"),
    "magnitude_norm": ("direction", "factors"),
    "head": ("paper", "aligned"),
    "encoding": ENCODINGS,
    "optimizer": ("sgd", "adam", "adamw"),
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda"),
}
"""settings that are one of a few words"""


class Range(NamedTuple):
    """The numbers from `low` to `high`; `above` and `below` leave the ends out."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:.10g}"


_WEIGHT = Range(0, 1e6)
_RATE = Range(0, 1e6, above=True)  # three of them multiplied still fit float32
_COUNT = Range(1, 1_000_000)
_COUNT_OR_NONE = Range(0, 1_000_000)
BOUNDS = {
    "tasks": _COUNT,
    "base_classes": _COUNT_OR_NONE,
    "base_epochs": _COUNT,
    "test_fraction": Range(0, 1, above=True, below=True),
    "validate": Range(0, 1, below=True),
    "train_limit": _COUNT_OR_NONE,
    "max_megapixels": Range(1, PILLOW_MAX_PIXELS // 10**6),
    "image_size": Range(0, 4096),
    "mean": Range(-1, 1),
    "std": Range(1e-4, 1e4),
    "absorb": Range(0, 1),
    "magnitude_init": Range(0, LIMITS.magnitude, above=True),
    "epochs": _COUNT,
    "lr": _RATE,
    "head_lr_factor": _RATE,
    "magnitude_lr_factor": _RATE,
    "weight_decay": _WEIGHT,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "workers": Range(0, 1024),
    "cache_gb": _WEIGHT,
    "seed": Range(0, 2**32 - 1),
}
"""settings that are numbers: each of them, for `mean` and `std`, lies in its range (so none is NaN)"""
MAX_RANK = 4096
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list of numbers",
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `sdlora-edge train`; the keys of its TOML file.

    Data
        data: "digits" (built in), a set's name (`train.datasets`), or a folder or ZIP of images, one folder per class.
        data_root: where named sets lie. protocol: "class" (each task brings new classes) or "domain" (each task brings a new
        domain of the same classes). tasks: cut classes or domains into so many. base_classes: that many are learned first, by
        plain training of the whole backbone, which is then frozen (for a backbone without pre-trained weights).
        test_fraction: of each class, where the data has no split of its own. validate: score on this share of the TRAINING
        images instead of the test images, to choose settings by. train_limit: at most so many training images of a
        class, or of a class in a domain (0: all). augment: "none", "flip", "crop" (random resized crop) or "flip-crop".
        max_megapixels: larger images are not decoded. strict: what the check of the images warns of is an error.
    Model
        weights: a safetensors file; empty means timm's own download. targets: patterns of the modules to adapt, with commas
        between; empty means the family's default. image_size 0: the backbone's own. mean, std: empty means the backbone's own.
    Method (equations in `method.sdlora`, `method.absorb`, `method.head`)
        method: "sdlora", "lora" (one direction trained on and on) or "frozen" (head only). rank: a number, or a schedule such
        as "10,8@4,6@8" (RR). directions: "free" (A_t random), "shared" (A_t = A_1, frozen) or "span" (A_t starts in the span of
        old rows). absorb: tau of KD, 0 is off. magnitudes: "carry", "reset" or "fixed" (old ones are not trained).
        magnitude_scope: "shared" or "projection". magnitude_norm: "direction", or "factors" (the authors' code). head: "paper"
        (a row is trained with its task) or "aligned" (all rows are fitted again after each task). encoding: of factors in
        packets, "fp32", "fp16", "int8" or "int4" (`encoding`); the run goes on from, and is scored with, what it ships.
        consistency: weight of a loss that holds the current images' features to those before the task.
    Training
        lr and its shares: head_lr_factor of the head (features are long vectors: at the full rate a head overshoots),
        magnitude_lr_factor of the magnitudes, later_lr_factor of everything from task 2 on. schedule: "constant" or
        "cosine". accumulate: images of a step are computed in so many parts. precision: "fp32", "bf16" or "fp16", by
        autocast, of training and of scoring (export compares in float64).
        cache_gb: images are decoded once and kept in memory up to so much; beyond, `workers` decode them in every epoch.
        tensorboard: write event files into the run. device: auto, cpu, cuda.
    """

    data: str = DIGITS
    data_root: str = ""
    protocol: str = "class"
    tasks: int = 5
    base_classes: int = 0
    base_epochs: int = 40
    test_fraction: float = 0.2
    validate: float = 0.0
    train_limit: int = 0
    augment: str = "none"
    max_megapixels: int = MAX_PIXELS // 10**6
    strict: bool = False
    backbone: str = "vit_tiny_patch16_224"
    weights: str = ""
    targets: str = ""
    image_size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    method: str = "sdlora"
    rank: str = "10"
    directions: str = "free"
    absorb: float = 0.0
    magnitudes: str = "carry"
    magnitude_norm: str = "direction"
    magnitude_init: float = 1.0
    head: str = "aligned"
    encoding: str = DEFAULT
    epochs: int = 10
    lr: float = 0.02
    head_lr_factor: float = 0.1
    magnitude_lr_factor: float = 0.1
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    workers: int = 2
    cache_gb: float = 4.0
    tensorboard: bool = False
    device: str = "auto"
    seed: int = 1993

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            if not all(one in bound for one in (value if isinstance(value, tuple) else (value,))):
                raise UsageError(f"{name} is {value}: it must be {bound}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(allowed)}"
                )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise UsageError(f"{name} must be three numbers, such as 0.5,0.5,0.5")
        self.rank_of(1)
        self._refuse_what_does_not_go_together()

    def _refuse_what_does_not_go_together(self) -> None:
        authors = self.magnitude_norm == "factors"
        ranks = [int(step.split("@")[0]) for step in self.rank.split(",")]
        together = [
            (authors and self.magnitudes != "reset", "magnitude_norm factors is the authors' code: it goes with magnitudes reset"),
            (bool(self.absorb) and (authors or self.method != "sdlora"), "absorb goes with method sdlora and magnitude_norm direction"),
            (self.method == "lora" and authors, "method lora has one magnitude: leave magnitude_norm at its default"),
            (self.method == "lora" and len(ranks) > 1, "method lora has one direction, so one rank"),
            (self.directions == "shared" and ranks != sorted(ranks, reverse=True), "with directions shared the rank may only fall"),
        ]  # fmt: skip
        if why := next((why for wrong, why in together if wrong), None):
            raise UsageError(why)

    def rank_of(self, task: int) -> int:
        """RR: the rank of a task's direction, tasks counted from 1. "10,8@4,6@8" is 10, 8 from task 4, 6 from task 8."""
        found = re.fullmatch(
            r"([1-9]\d{0,5})((?:,[1-9]\d{0,5}@[1-9]\d{0,5})*)", self.rank.replace(" ", "")
        )
        if not found:
            raise UsageError(
                f"rank is {self.rank!r}: give a number, or a schedule such as 10,8@4,6@8"
            )
        steps = [(1, int(found[1]))] + [
            (int(s[1]), int(s[0])) for s in (p.split("@") for p in found[2].split(",") if p)
        ]
        if [at for at, _ in steps] != sorted({at for at, _ in steps}):
            raise UsageError(f"rank is {self.rank!r}: its tasks must ascend")
        if max(rank for _, rank in steps) > MAX_RANK:
            raise UsageError(f"rank is {self.rank!r}: it must be at most {MAX_RANK}")
        return [rank for at, rank in steps if at <= task][-1]

    def to_toml(self) -> str:
        return tomli_w.dumps(
            {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        )


DIGITS_DEFAULTS: dict[str, Any] = {
    "tasks": 3,
    "base_classes": 4,
    "backbone": "micro_vit",
    "image_size": 16,
    "test_fraction": 0.3,
    "rank": "4",
    "lr": 0.01,
}
"""What differs for the embedded default, whose whole run takes well under two minutes on two cores."""


def resolve(
    file: Path | None, flags: Mapping[str, Any], preset: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Flags win over the file, the file over the preset, the preset over the defaults; a flag that is None was not given.

    Raises InputError for a file that is no TOML, UsageError for an unknown key or a value out of range.
    """
    values = {**(preset or {}), **(_settings(file) if file else {})}
    values |= {name: value for name, value in flags.items() if value is not None}
    if values.get("data", DIGITS) == DIGITS:
        values = DIGITS_DEFAULTS | values
    return from_values(values)


def load(path: Path) -> TrainConfig:
    """The resolved settings of a run."""
    return from_values(_settings(path))


def recorded_in(path: Path) -> dict[str, str]:
    """What `recorded` said when the run was made; empty if it says nothing."""
    found = _read(path).get(RECORDED, {})
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def recorded() -> dict[str, str]:
    """What a run was made with, for the table [recorded] of its config.toml: versions of Python and of the packages that matter."""
    packages = ("sdlora-edge", "torch", "timm", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def from_values(values: Mapping[str, Any]) -> TrainConfig:
    kinds = {f.name: type(f.default) for f in fields(TrainConfig)}
    for name in values:
        if name not in kinds:
            raise UsageError(f"unknown setting {name}: {nearest(name, kinds)}")
    if type(values.get("rank")) is int:
        values = {**values, "rank": str(values["rank"])}
    return TrainConfig(**{name: _cast(name, kinds[name], value) for name, value in values.items()})


def nearest(word: str, known: Iterable[str]) -> str:
    """What to use instead of a word that is not known: the nearest one, and all."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {found[0]}? " if found else "") + f"known are {', '.join(known)}"


def _cast(name: str, kind: type, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if kind is tuple and isinstance(value, (list, tuple)):
            return tuple(_cast(name, float, v) for v in value)
        if number and (kind is float or (kind is int and int(value) == value)):
            return kind(value)
        if kind in (str, bool) and type(value) is kind:
            return value
    except (
        OverflowError,
        ValueError,
    ):  # inf and nan are no whole numbers, and a whole number may be too large for a float
        pass
    raise UsageError(f"{name} is {str(value)[:80]!r}: it must be {_KINDS[kind]}")


def _settings(path: Path) -> dict[str, Any]:
    """Without what a run has recorded beside them, so that a run's file serves as --config too."""
    return {name: value for name, value in _read(path).items() if name != RECORDED}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(atomic.read(path, 1 << 20).decode())
    except ValueError as error:
        raise InputError(f"{path} is not a TOML file: {error}") from error

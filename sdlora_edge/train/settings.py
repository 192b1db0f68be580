"""The settings of a run. Each is declared once, here.

From a declaration come the TOML file (`train.config`), the options of `sdlora-edge train`
(`cli.options`) and docs/configuration.md. No import of numpy, Pillow or torch: `train --help` reads
this module.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UsageError
from ..inputs.sizes import MAX_PIXELS, PILLOW_MAX_PIXELS
from ..method.feature_spec import AUTO, FeatureSpec
from ..results import Result
from .declaration import Range, Setting, declared, nearest
from .ranks import rank_steps

DIGITS = "digits"
MAX_MAGNITUDE = 1e4  # `formats.limits.LIMITS.magnitude`, the largest magnitude of a packet
WEIGHT = Range(0, 1e6)
RATE = Range(0, 1e6, above=True)  # a product of three of them still fits float32
COUNT = Range(1, 1_000_000)
COUNT_OR_NONE = Range(0, 1_000_000)


class Group(Result):
    """A table of settings; its values are checked when it is made."""

    def __post_init__(self) -> None:
        for setting in SETTINGS.values():
            if isinstance(self, GROUPS[setting.group]):
                setting.check(getattr(self, setting.name))


@dataclass(frozen=True)
class DataSettings(Group):
    """What is learned from, and how it is split."""

    data: str = declared(
        DIGITS,
        "Folder or ZIP with one folder per class (inside train/ and test/, or split by the seed),"
        " or a dataset's name. digits is built in.",
        metavar="FOLDER|ZIP|NAME",
    )
    data_root: str = declared("", "Folder that holds the named datasets.", metavar="FOLDER")
    protocol: str = declared(
        "class",
        "class: each task brings new classes. domain: each task brings new images of the same"
        " classes, from folders <domain>/<class>/.",
        choices=("class", "domain"),
    )
    tasks: int = declared(
        5, "Number of tasks to split the classes (or domains) into.", COUNT, metavar="N"
    )
    base_classes: int = declared(
        0,
        "Number of classes to train the whole backbone on before the first task. It is frozen"
        " afterwards. Needed if the backbone has no pre-trained weights.",
        COUNT_OR_NONE,
        metavar="N",
    )
    base_epochs: int = declared(40, "Epochs of that base session.", COUNT, metavar="N")
    test_fraction: float = declared(
        0.2,
        "Share of each class to keep for testing if there is no test/ folder.",
        Range(0, 1, above=True, below=True),
        metavar="SHARE",
    )
    validate: float = declared(
        0.0,
        "Score on this share of the training images (or on val/) instead of the test images,"
        " to choose settings. 0 disables.",
        Range(0, 1, below=True),
        metavar="SHARE",
    )
    train_limit: int = declared(
        0,
        "Largest number of training images per class (per class and domain). 0: no limit.",
        COUNT_OR_NONE,
        metavar="N",
    )
    held_out: float = declared(
        0.05,
        "Share of each class's training images that train no direction. Temperature and unknown"
        " threshold are measured on them. 0 disables.",
        Range(0, 1, below=True),
        metavar="SHARE",
    )
    augment: str = declared(
        "none",
        "Random views of training images. crop: random resized crop.",
        choices=("none", "flip", "crop", "flip-crop"),
    )
    max_megapixels: int = declared(
        MAX_PIXELS // 10**6,
        "Skip larger images before they are decoded.",
        Range(1, PILLOW_MAX_PIXELS // 10**6),
        metavar="N",
    )
    strict: bool = declared(
        False, "Treat warnings about the images as errors, before anything is trained."
    )


@dataclass(frozen=True)
class BackboneSettings(Group):
    """The frozen model, and what of it is adapted."""

    backbone: str = declared(
        "vit_tiny_patch16_224",
        "A timm model: ViT, DeiT, DINOv2, EVA, Swin, EfficientNet, MobileNet, ConvNeXt or ResNet."
        " For texts, with a slash: a folder or a Hugging Face model.",
        metavar="MODEL",
    )
    weights: str = declared(
        "", "Safetensors file with its weights. Empty: timm downloads them.", metavar="FILE"
    )
    targets: str = declared(
        "",
        "Modules to adapt: patterns with commas between them. Empty: as is best for the model.",
        metavar="PATTERNS",
    )
    image_size: int = declared(
        0,
        "Side of the model's input in pixels. 0: the backbone's own.",
        Range(0, 4096),
        metavar="PIXELS",
    )
    max_tokens: int = declared(
        0, "Tokens of a text; the rest is cut off. 0: 128.", Range(0, 1 << 15), metavar="N"
    )
    mean: tuple[float, ...] = declared(
        (),
        "Mean for normalising R, G, B in 0..1. Empty: the backbone's own.",
        Range(-1, 1),
        metavar="R,G,B",
    )
    std: tuple[float, ...] = declared(
        (),
        "Standard deviation for normalising R, G, B in 0..1. Empty: the backbone's own.",
        Range(1e-4, 1e4),
        metavar="R,G,B",
    )


@dataclass(frozen=True)
class MethodSettings(Group):
    """SD-LoRA's parts; equations in `method.sdlora`, `method.absorb` and `method.head`."""

    method: str = declared(
        "sdlora",
        "sdlora: one direction per task. lora: one direction that every task trains further."
        " frozen: train only the head.",
        choices=("sdlora", "lora", "frozen"),
    )
    rank: str = declared(
        "10",
        "Rank of each task's direction, or a schedule (RR): 10,8@4,6@8 is 8 from task 4 and 6 from"
        " task 8.",
        metavar="RANK",
    )
    directions: str = declared(
        "free",
        "Where a task's A comes from. free: random. shared: the first task's, frozen.",
        choices=("free", "shared"),
    )
    absorb: float = declared(
        0.0,
        "KD: drop a direction if that loses at most this share of all that was learned."
        " 0 disables.",
        Range(0, 1),
        metavar="ERROR",
    )
    magnitudes: str = declared(
        "carry",
        "Old magnitudes when a task begins. carry: train on from their last values. reset: start"
        " again (the authors' code). fixed: do not train them.",
        choices=("carry", "reset", "fixed"),
    )
    magnitude_norm: str = declared(
        "direction",
        "What divides an old direction. direction: its norm (the paper). factors: the norms of A"
        " and B (the authors' code).",
        choices=("direction", "factors"),
    )
    magnitude_init: float = declared(
        1.0,
        "First value of a magnitude.",
        Range(0, MAX_MAGNITUDE, above=True),
        metavar="NUMBER",
    )
    head: str = declared(
        "aligned",
        "paper: train a row with its task. aligned: fit all rows again after each task.",
        choices=("paper", "aligned"),
    )
    features: str = declared(
        AUTO,
        "What the head sees. last: what the backbone returns. cls:N, mean:N, cls+mean:N: class"
        " token and mean of the patches (or of a stage) of the last N blocks (or stages). auto:"
        " by the model's family; last with head paper.",
        metavar="TOKENS",
    )
    head_rank: int = declared(
        8,
        "Largest rank of the change of known head rows. A known class with new images may add one.",
        Range(1, 1024),
        metavar="RANK",
    )
    encoding: str = declared(
        "fp16",
        "Encoding of factors in packets. The run continues from, and is scored with, what it"
        " ships.",
        choices=("fp32", "fp16", "int8", "int4"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_of(1)
        wide = self.features != AUTO and bool(FeatureSpec.parse(self.features).tokens)
        authors, ranks = self.magnitude_norm == "factors", [r for _, r in rank_steps(self.rank)]
        lora, shared = self.method == "lora", self.directions == "shared"
        rules = (
            (
                authors and self.magnitudes != "reset",
                "magnitude_norm factors is the authors' code: set magnitudes to reset",
            ),
            (
                self.absorb > 0 and (authors or self.method != "sdlora"),
                "absorb needs method sdlora and magnitude_norm direction: set absorb to 0",
            ),
            (
                wide and self.head == "paper",
                f"head paper is trained with its task and sees only what the backbone returns, not "
                f"{self.features}: set features to last or auto, or head to aligned",
            ),
            (
                lora and authors,
                "method lora has one magnitude: leave magnitude_norm at its default",
            ),
            (lora and len(ranks) > 1, "method lora has one direction: give one rank"),
            (
                shared and ranks != sorted(ranks, reverse=True),
                "directions shared needs ranks that only fall: give a falling schedule",
            ),
        )
        for broken, message in rules:
            if broken:
                raise UsageError(message)

    def rank_of(self, task: int) -> int:
        """RR: return the rank of a task's direction. The first task is 1."""
        return [rank for at, rank in rank_steps(self.rank) if at <= task][-1]


@dataclass(frozen=True)
class TrainingSettings(Group):
    """How a task is trained."""

    epochs: int = declared(10, "Epochs per task.", COUNT, metavar="N")
    min_steps: int = declared(
        40,
        "Least number of optimizer steps per task. A task with few images gets more epochs.",
        COUNT_OR_NONE,
        metavar="N",
    )
    first_task: float = declared(
        2.0,
        "Length of the first task, relative to later ones. Without effect after a base session.",
        Range(1, 100),
        metavar="TIMES",
    )
    turned: float = declared(
        0.5,
        "Share of training images that are turned by 90, 180 or 270 degrees. While a task is"
        " trained, each turn of a class is a class of its own. Choose 0 for images without an"
        " upright side, such as textures or cells.",
        Range(0, 1, below=True),
        metavar="SHARE",
    )
    lr: float = declared(0.02, "Learning rate of the new direction.", RATE, metavar="RATE")
    head_lr_factor: float = declared(
        0.1,
        "Learning rate of the head, as a share of lr. Features are long vectors, so a head"
        " overshoots at the full rate.",
        RATE,
        metavar="SHARE",
    )
    magnitude_lr_factor: float = declared(
        0.1, "Learning rate of the magnitudes, as a share of lr.", RATE, metavar="SHARE"
    )
    optimizer: str = declared(
        "sgd", "Optimizer. sgd has momentum 0.9.", choices=("sgd", "adam", "adamw")
    )
    weight_decay: float = declared(
        0.0, "Weight decay of the new direction.", WEIGHT, metavar="NUMBER"
    )
    batch_size: int = declared(64, "Images per step, over all processes.", COUNT, metavar="N")
    accumulate: int = declared(1, "Split each batch into this many parts.", COUNT, metavar="N")
    precision: str = declared(
        "fp32",
        "Precision of training and scoring; bf16 and fp16 by autocast.",
        choices=("fp32", "bf16", "fp16"),
    )
    compile: bool = declared(False, "Compile the training step with torch.compile.")
    workers: int = declared(
        2,
        "Processes that decode images if they do not fit the cache.",
        Range(0, 1024),
        metavar="N",
    )
    cache_gb: float = declared(
        4.0,
        "Memory for decoded images. If a task's images need more, they are decoded again in every"
        " epoch.",
        WEIGHT,
        metavar="GB",
    )
    tensorboard: bool = declared(False, "Write TensorBoard event files into the run.")
    device: str = declared("auto", "Device to train on.", choices=("auto", "cpu", "cuda"))
    seed: int = declared(
        1993, "Seed of class order, split and training.", Range(0, 2**32 - 1), metavar="N"
    )


GROUPS: dict[str, type[Group]] = {
    "data": DataSettings,
    "backbone": BackboneSettings,
    "method": MethodSettings,
    "training": TrainingSettings,
}
SETTINGS: dict[str, Setting] = {
    f.name: Setting(f.name, group, f.default, **f.metadata)
    for group, table in GROUPS.items()
    for f in fields(table)
}
"""every setting by its name, in the order of the groups"""

DIGITS_DEFAULTS: dict[str, Any] = {
    "tasks": 3,
    "base_classes": 4,
    "backbone": "micro_vit",
    "image_size": 16,
    "test_fraction": 0.3,
    "rank": "4",
    "lr": 0.01,
    "turned": 0.0,  # a 6 that is turned is a 9
    "min_steps": 0,
}
"""What differs for the built-in digits, so that a run takes well under two minutes on two cores."""


@dataclass(frozen=True)
class Settings(Result):
    """The settings of `sdlora-edge train`: one dataclass per table of its TOML file.

    `Settings.of(data="images", tasks=2)` makes them as the command line does.
    """

    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Return settings from values by name, as the command line does. Tables do not matter.

        The others keep their defaults. The built-in digits, which are learned without `data`, have
        defaults of their own. So has a backbone that reads texts.

        Raises:
            UsageError: There is no such setting, or a value has a wrong type or is out of range.
        """
        if values.get("data", DIGITS) == DIGITS:
            values = DIGITS_DEFAULTS | values
        elif isinstance(backbone := values.get("backbone"), str):
            from ..inputs.modality import kind_of, of_kind  # numpy: not for train --help

            values = {**of_kind(kind_of(backbone)).defaults, **values}
        return cls().changed(**values)

    def changed(self, **values: Any) -> Settings:
        """Return these settings with some changed, by name. Raises UsageError as `of`."""
        by_group: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in SETTINGS:
                raise UsageError(f"unknown setting {name}: {nearest(name, SETTINGS)}")
            setting = SETTINGS[name]
            if name == "rank" and type(value) is int:
                value = str(value)
            by_group.setdefault(setting.group, {})[name] = setting.cast(value)
        changed = {group: replace(getattr(self, group), **own) for group, own in by_group.items()}
        return replace(self, **changed)

    def flat(self) -> dict[str, Any]:
        """Return every value by the name of its setting."""
        return {name: getattr(getattr(self, s.group), name) for name, s in SETTINGS.items()}

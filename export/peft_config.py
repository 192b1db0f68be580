"""How a `peft` adapter's adapter_config.json says that its tensors become weights.

What plain factors cannot represent is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..formats.canonical import parse_json
from ..formats.limits import LIMITS
from ..storage import atomic

CONFIG = "adapter_config.json"
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save"}
_WITHOUT_EFFECT = {
    # the tensors' own names say it
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "lora_dropout", "eva_config", "ensure_weight_tying", "megatron_core"),
    "qalora_group_size",
}
_Patterns = tuple[tuple[re.Pattern[str], float], ...]
_NAME = re.compile(r"\^?([\w-]|\\?\.)+\$?")
"""Such a pattern repeats nothing and offers no choice, so no name takes long to match."""
MOST_PATTERNS = 1000
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""How A and B may have been initialised. The other ways (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
change the backbone's weights."""


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that says how tensors become weights."""

    path: Path
    r: int
    lora_alpha: float
    ranks: _Patterns
    alphas: _Patterns
    modules_to_save: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read it from an adapter's folder.

        Raises InputError for another kind of adapter, or a variant of LoRA that plain factors do
        not represent.
        """
        path = folder / CONFIG
        value = parse_json(atomic.read(path, LIMITS.header), str(path))
        if (kind := value.get("peft_type")) != "LORA":
            raise InputError(
                f"{folder} is a {kind} adapter: only LORA becomes the factors of a task"
            )
        if (start := value.get("init_lora_weights")) not in _STARTS:
            raise InputError(
                f"{folder} uses init_lora_weights={start}, which changes the backbone's own "
                "weights: convert it in peft first"
            )
        plain = {"init_lora_weights": start, "bias": "none"}
        for name, setting in value.items():
            if name not in _READ | _WITHOUT_EFFECT and setting and setting != plain.get(name):
                raise InputError(
                    f"{folder} uses {name}={setting}, which a task's factors cannot represent: "
                    "train the adapter without it"
                )
        try:
            return cls(
                folder,
                _rank(value["r"]),
                _alpha(value["lora_alpha"]),
                _patterns(folder, value, "rank_pattern", _rank),
                _patterns(folder, value, "alpha_pattern", _alpha),
                tuple(str(m) for m in value.get("modules_to_save") or ()),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not the configuration of a LoRA adapter ({error!r}): save it again"
            ) from error

    def scaling(self, module: str, A: np.ndarray, B: np.ndarray) -> np.float32:
        """lora_alpha / r of one module. Raises InputError unless its factors are of rank r."""
        rank, alpha = (
            _first(p, module, d) for p, d in ((self.ranks, self.r), (self.alphas, self.lora_alpha))
        )
        if not len(A) == B.shape[1] == rank:
            raise InputError(
                f"{self.path}: {module} has factors {A.shape} and {B.shape}, but {CONFIG} says "
                f"rank {rank}: save the adapter again"
            )
        return np.float32(alpha / rank)


def _rank(value: Any) -> int:
    if not 1 <= (rank := int(value)) <= 2**31:
        raise ValueError(f"a rank of {rank}")
    return rank


def _alpha(value: Any) -> float:
    if not abs(alpha := float(value)) <= 1e6:
        raise ValueError(f"a lora_alpha of {alpha:g}")
    return alpha


def _patterns(
    folder: Path, config: Mapping[str, Any], name: str, number: Callable[[Any], float]
) -> _Patterns:
    """Patterns that are names of modules.

    peft takes any regular expression, and one from a stranger's file could run for ever.
    """
    values = config.get(name) or {}
    if len(values) > MOST_PATTERNS:
        raise InputError(
            f"{folder} has a {name} of {len(values)} entries, but at most {MOST_PATTERNS} are "
            "allowed: train it with fewer"
        )
    for pattern in values:
        if len(pattern) > LIMITS.name or not _NAME.fullmatch(pattern):
            raise InputError(
                f"{folder} has {pattern!r} in its {name}: write it as the end of a module's name, "
                "such as attn.qkv"
            )
    return tuple(
        (re.compile(rf"(.*\.)?({pattern})$"), number(value)) for pattern, value in values.items()
    )


def _first(patterns: _Patterns, module: str, default: float) -> float:
    """The first pattern's value that fits the end of the module's name, as peft matches them."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)

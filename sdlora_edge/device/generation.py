"""What a device serves at one time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.encoding import Factors
from ..formats.signing import Trust
from ..state import TaskState
from .store import Generation


@dataclass(eq=False)
class Live:
    """Everything one generation needs to answer. Never changed, but for `loaded` where memory is short: an update makes another
    one and swaps the reference.

    record: in force when it was made. loaded: the engine's; None while it is given up. damage: why these are fewer packets than
    the record names, or who may sign is not known. damaged: the packets of the record that were damaged then.
    """

    record: Generation
    packets: tuple[str, ...]
    state: TaskState
    factors: tuple[dict[str, Factors], ...]
    canary_seed: int
    canary_logits: np.ndarray
    trust: Trust
    revision: int
    loaded: Any = None
    damage: str = ""
    damaged: tuple[str, ...] = ()

    @property
    def counter(self) -> int:
        """The generation's; 0 for what is left of a damaged one."""
        return self.record.counter if self.packets == self.record.packets else 0

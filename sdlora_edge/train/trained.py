"""What `train` and `packet from-peft` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..results import Result

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Trained(Result):
    """A run after its newest task.

    Attributes:
        run: Its folder.
        tasks: How many it has learned.
        classes: The live classes.
        metrics: metrics.json of the newest task.
    """

    run: Path
    tasks: int
    classes: tuple[str, ...]
    metrics: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> Trained:
        """What a run has learned."""
        return cls(run.path, len(run.updates), run.states[-1].names, run.metrics[-1])

"""`current.json`: says which generation the files beside it are, for programs in other languages.

The files are in place before current.json is renamed over its predecessor: that rename is the
commit. A program reads current.json first, then the files it names, and compares their SHA-256 if
it wants to be sure that they are the same generation.

Its numbers are plain JSON numbers, not integers of one unit: nobody signs this file, and scales
range over many powers of ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..state import TaskState
from ..storage import atomic
from .canonical import dump_json, parse_json
from .confidence import Confidence
from .fields import digest, either, listed, mapped, record, text, whole
from .limits import LIMITS

CURRENT = "current.json"
FORMAT = "sdlora-edge/current/1"
LIMIT = 64 * 1024 * 1024
"""bytes"""


def _null(value: object) -> None:
    if value is not None:
        raise ValueError(f"{value!r} is not null")


def _files(value: Any) -> None:
    mapped(digest)(value)
    for name in value:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} does not lie beside {CURRENT}")


def _number(value: object) -> None:
    if type(value) is not float:  # `parse_json` refuses those that are not finite
        raise ValueError(f"{value!r} is not a float")


_NUMBERS = listed(_number, 0, LIMITS.rows)
_CONFIDENCE = record(
    {
        "temperature": _number,
        "weight": listed(listed(whole(-128, 127), 0, LIMITS.rows), 0, LIMITS.rows),
        "scale": _NUMBERS,
        "bias": _NUMBERS,
        "mean": _NUMBERS,
        "precision": _NUMBERS,
        "threshold": either(_null, _number),
    }
)
KINDS = {
    "lineage": digest,
    "state": digest,
    "task": whole(0, LIMITS.sequence),
    "classes": listed(either(_null, text()), 0, LIMITS.rows),
    "confidence": _CONFIDENCE,
    "files": _files,
}


@dataclass(frozen=True)
class Current:
    """The content of current.json.

    Args:
        lineage: State digest S_0.
        state: State digest S_t.
        task: t.
        classes: The name of each head row, in order; None for a retired one.
        confidence: What turns outputs into a probability and a score, as `described` has it.
        files: {name: SHA-256} of the files beside it.
    """

    lineage: str
    state: str
    task: int
    classes: tuple[str | None, ...]
    confidence: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def of(cls, lineage: str, state: TaskState, files: Mapping[str, str]) -> Current:
        """For a task state."""
        told = described(state.confidence)
        return cls(lineage, state.digest, state.task, state.classes, told, files)

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return dump_json({"format": FORMAT, **vars(self)})

    @classmethod
    def read(cls, folder: Path) -> Current | None:
        """The one in a folder; None if there is none that is intact."""
        try:
            value = parse_json(atomic.read(folder / CURRENT, LIMIT), CURRENT)
            if value.pop("format", None) != FORMAT:
                return None
            record(KINDS)(value)
        except (InputError, ValueError, TypeError, AttributeError):
            return None
        return cls(**{**value, "classes": tuple(value["classes"])})

    def write(self, folder: Path, like: Path | None = None) -> None:
        """Replace the one in a folder. Raises StorageError, ResourceError."""
        atomic.write(folder / CURRENT, self.to_json(), like=like)


def described(confidence: Confidence) -> dict[str, Any]:
    """The tensors of `Confidence` as plain numbers.

    Returns:
        {"temperature": T, "weight": k lists of an integer for each live row, "scale": k numbers,
        "bias": k numbers, "mean" and "precision": a number for each feature, or none, "threshold":
        a number, or None if every image counts as known}. Each is exactly the tensor's value.
    """
    return {
        "temperature": float(confidence.temperature[0]),
        "weight": confidence.weight.tolist(),
        "scale": confidence.scale.tolist(),
        "bias": confidence.bias.tolist(),
        "mean": confidence.mean.tolist(),
        "precision": confidence.precision.tolist(),
        "threshold": confidence.least,
    }

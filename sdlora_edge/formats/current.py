"""`current.json`: says which generation the files beside it are, for programs in other languages.

The files are in place before current.json is renamed over its predecessor: that rename is the
commit. A program reads current.json first, then the files it names, and compares their SHA-256 if
it wants to be sure that they are the same generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..state import TaskState
from ..storage import atomic
from .canonical import dump_json, parse_exact_json
from .fields import digest, either, listed, mapped, record, text, whole
from .limits import LIMITS

CURRENT = "current.json"
FORMAT = "sdlora-edge/current/1"
LIMIT = 64 * 1024 * 1024
"""bytes"""


def _retired(value: object) -> None:
    if value is not None:
        raise ValueError(f"{value!r} is not null")


def _files(value: Any) -> None:
    mapped(digest)(value)
    for name in value:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} does not lie beside {CURRENT}")


KINDS = {
    "lineage": digest,
    "state": digest,
    "task": whole(0, LIMITS.sequence),
    "classes": listed(either(_retired, text()), 0, LIMITS.rows),
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
        files: {name: SHA-256} of the files beside it.
    """

    lineage: str
    state: str
    task: int
    classes: tuple[str | None, ...]
    files: Mapping[str, str]

    @classmethod
    def of(cls, lineage: str, state: TaskState, files: Mapping[str, str]) -> Current:
        """For a task state."""
        return cls(lineage, state.digest, state.task, state.classes, files)

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return dump_json({"format": FORMAT, **vars(self)})

    @classmethod
    def read(cls, folder: Path) -> Current | None:
        """The one in a folder; None if there is none that is intact."""
        try:
            value = parse_exact_json(atomic.read(folder / CURRENT, LIMIT), CURRENT)
            if value.pop("format", None) != FORMAT:
                return None
            record(KINDS)(value)
        except (InputError, ValueError, TypeError, AttributeError):
            return None
        return cls(**{**value, "classes": tuple(value["classes"])})

    def write(self, folder: Path, like: Path | None = None) -> None:
        """Replace the one in a folder. Raises StorageError, ResourceError."""
        atomic.write(folder / CURRENT, self.to_json(), like=like)

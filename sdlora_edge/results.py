"""What public functions return: frozen dataclasses, whose `to_dict()` is exactly what `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """The base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: paths as strings, tuples as lists, results as objects."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        raise TypeError(f"{type(value).__name__} is not a Result")
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value

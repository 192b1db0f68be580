"""Settings in files: a TOML file with a table per group, and a run's config.toml.

config.toml has one more table, [recorded]: the versions that the run was made with.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..storage import atomic
from .declaration import nearest
from .settings import GROUPS, SETTINGS, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECORDED = "recorded"
HEADER = "# Settings of a run of sdlora-edge; `sdlora-edge train --config FILE` reads them too."


def resolve(
    file: Path | None, flags: Mapping[str, Any], preset: Mapping[str, Any] | None = None
) -> Settings:
    """Return settings: flags win over the file, the file over the preset, that over the defaults.

    Args:
        file: a TOML file with the tables of `GROUPS`.
        flags: values by the names of the settings; None stands for a flag that was not given.
        preset: values by the names of the settings.

    Raises:
        InputError: if the file is no TOML.
        UsageError: if a key is unknown or in the wrong table, or a value is out of range.
    """
    values = {**(preset or {}), **(_settings(file) if file else {})}
    values |= {name: value for name, value in flags.items() if value is not None}
    return Settings.of(**values)


def load(path: Path) -> Settings:
    """Return the resolved settings of a run. Raises as `resolve`."""
    return Settings().changed(**_settings(path))


def to_toml(settings: Settings) -> str:
    """Return the text of a TOML file: a table per group, and above each key what it means."""
    import tomli_w  # of the host extra

    values, lines = settings.flat(), [HEADER]
    for group in GROUPS:
        lines += ["", f"[{group}]"]
        for setting in SETTINGS.values():
            if setting.group == group:
                value = values[setting.name]
                written = {setting.name: list(value) if isinstance(value, tuple) else value}
                lines += [f"# {setting.help}", tomli_w.dumps(written).rstrip()]
    return "\n".join(lines) + "\n"


def recorded() -> dict[str, str]:
    """Return the table [recorded]: versions of Python and of the packages that matter."""
    packages = ("sdlora-edge", "torch", "timm", "numpy", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def recorded_in(path: Path) -> dict[str, str]:
    """Return what the table [recorded] of a file says; empty if there is none."""
    found = _read(path).get(RECORDED, {})
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _settings(path: Path) -> dict[str, Any]:
    """Return the values of a file by name.

    [recorded] is left out, so that a run's file serves as --config too.
    """
    return {
        name: value
        for table, own in _read(path).items()
        if table != RECORDED
        for name, value in _table(path, table, own)
    }


def _table(path: Path, table: str, own: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of one table.

    Raises:
        UsageError: if a key is unknown, or belongs in another table.
    """
    if table in GROUPS and not isinstance(
        own, dict
    ):  # "data", "backbone" and "method" are keys too
        raise UsageError(
            f"{path}: {table} stands outside any table: write it below [{SETTINGS[table].group}]"
            if table in SETTINGS
            else f"{path}: {table} must be a table: write [{table}]"
        )
    if table not in GROUPS:
        raise UsageError(f"{path}: {_unknown(table)}")
    for name, value in own.items():
        if name not in SETTINGS or SETTINGS[name].group != table:
            raise UsageError(f"{path}: [{table}] {_unknown(name)}")
        yield name, value


def _unknown(name: str) -> str:
    if name in SETTINGS:
        return f"{name} belongs in the table [{SETTINGS[name].group}]: write it below that line"
    return f"unknown setting {name}: {nearest(name, SETTINGS)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(atomic.read(path, 1 << 20).decode())
    except ValueError as error:
        raise InputError(f"{path} is not a TOML file: {error}") from error

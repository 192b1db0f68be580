"""The options of `sdlora-edge train`: one for each setting, made from its declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Annotated, Any, Optional, get_type_hints

import typer

from ..errors import UsageError
from ..train.declaration import Setting
from ..train.settings import SETTINGS


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command an option for each setting, after its own ones.

    Args:
        command: Its parameter `flags` gets {name: value} of the settings that were given.
    """

    @wraps(command)
    def called(**given: Any) -> None:
        flags = {name: given.pop(name) for name in SETTINGS}
        found = {name: _value(SETTINGS[name], v) for name, v in flags.items() if v is not None}
        command(**given, flags=found)

    hints = get_type_hints(command, include_extras=True)
    own = [p for name, p in inspect.signature(command).parameters.items() if name != "flags"]
    parameters = [p.replace(annotation=hints[p.name]) for p in own]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(s))
        for name, s in SETTINGS.items()
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _option(setting: Setting) -> Any:
    """Return the annotation that typer makes an option of."""
    annotated, optional, enum = Annotated, Optional, Enum  # type: Any, Any, Any
    flag, kind = setting.flag, setting.kind
    if setting.choices:
        kind = enum(setting.name, {word: word for word in setting.choices}, type=str)
    elif kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif kind is tuple:
        kind = str
    default = f" Default: {setting.shown_default}." if setting.shown_default else ""
    option = typer.Option(
        flag,
        help=setting.help + default,
        metavar=setting.metavar or None,
        rich_help_panel=setting.group.capitalize(),
    )
    return annotated[optional[kind], option]


def _value(setting: Setting, given: Any) -> Any:
    """Return the value as a TOML file would give it."""
    if isinstance(given, Enum):
        return given.value
    if setting.kind is not tuple:
        return given
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{setting.flag} {given!r}: give three numbers, such as 0.5,0.5,0.5"
        ) from error
    return numbers * 3 if len(numbers) == 1 else numbers

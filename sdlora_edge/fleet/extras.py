"""Packages that only the fleet needs. A device without them goes on serving."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import UsageError


def need(package: str, extra: str) -> ModuleType:
    """Import a package of an extra, such as `paho.mqtt.client` of `agent`.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this needs {package.partition('.')[0]}, which is not installed: "
            f"run pip install 'sdlora-edge[{extra}]'"
        ) from error

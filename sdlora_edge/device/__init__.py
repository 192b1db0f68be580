"""The device side: numpy, Pillow and one engine, never torch.

Names resolve lazily, so importing this imports no engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Prediction
    from .device import Device

_WHERE = {"Device": "device", "Prediction": "answers"}
__all__ = ["Device", "Prediction"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

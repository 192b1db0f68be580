"""The device side: numpy, Pillow and one engine, never torch.

Names resolve lazily, so importing this imports no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import Prediction
    from .device import Device

__all__ = ["Device", "Prediction"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import device

        return getattr(device, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

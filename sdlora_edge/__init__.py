"""Continual learning for a fleet of edge devices: SD-LoRA on the workstation, signed update packets on the wire.

The public names resolve lazily: importing the package imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import open_bundle
    from .device import Device, Prediction
    from .errors import SdloraError
    from .export.bundles import export_bundle
    from .train.config import TrainConfig
    from .train.trainer import add_task, train

__version__ = "0.1.0"

_WHERE = {
    "Device": "device.runtime",
    "Prediction": "device.runtime",
    "SdloraError": "errors",
    "TrainConfig": "train.config",
    "add_task": "train.trainer",
    "export_bundle": "export.bundles",
    "open_bundle": "bundle",
    "train": "train.trainer",
}

__all__ = ["Device", "Prediction", "SdloraError", "TrainConfig", "add_task", "export_bundle", "open_bundle", "train"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

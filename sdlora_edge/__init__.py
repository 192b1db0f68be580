"""Continual learning for a fleet of edge devices: SD-LoRA on the workstation, signed update packets on the wire.

The public names resolve lazily: importing the package imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device, Prediction
    from .errors import SdloraError
    from .export.bundles import export_bundle
    from .formats.bundle import open_bundle
    from .train.loop import add_task, train
    from .train.settings import Settings

__version__ = "0.1.0"

# From 1.29 on, ONNX Runtime reports to its vendor, unless this is set before it is first imported, by anyone in this process.
if "ORT_DISABLE_TELEMETRY" not in os.environ:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if "onnxruntime" in sys.modules:
        logging.getLogger(__name__).warning(
            "onnxruntime was imported before sdlora_edge, so it may send telemetry: import sdlora_edge first, "
            "or set ORT_DISABLE_TELEMETRY=1 in the environment"
        )

_WHERE = {
    "Device": "device.device",
    "Prediction": "device.answers",
    "SdloraError": "errors",
    "Settings": "train.settings",
    "add_task": "train.loop",
    "export_bundle": "export.bundles",
    "open_bundle": "formats.bundle",
    "train": "train.loop",
}

__all__ = [
    "Device",
    "Prediction",
    "SdloraError",
    "Settings",
    "add_task",
    "export_bundle",
    "open_bundle",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

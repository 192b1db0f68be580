"""Continual learning for a fleet of edge devices, with SD-LoRA and signed update packets.

The public names resolve lazily, so importing the package imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device.answers import Prediction
    from .device.device import Device
    from .device.watch.service import watch
    from .errors import (
        HealthError,
        InputError,
        NotForThisDevice,
        NothingToDo,
        ResourceError,
        SdloraError,
        TrustError,
        UsageError,
    )
    from .export.bundles import export_bundle
    from .export.issuing import KeyChange, revoke, rotate_keys, sign_packet, squash_packets
    from .export.packets import build_packets
    from .export.requests import ExportOptions, PacketOptions
    from .formats.bundle import open_bundle
    from .formats.signing import new_key
    from .results import Status
    from .train.evaluator import evaluate
    from .train.loop import add_task, resume, train
    from .train.plan import ClassChanges
    from .train.run import Run
    from .train.settings import Settings

__version__ = "0.1.0"

# ONNX Runtime from 1.29 on reports to its vendor, unless this is set before its first import.
if "ORT_DISABLE_TELEMETRY" not in os.environ:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    if "onnxruntime" in sys.modules:
        logging.getLogger(__name__).warning(
            "onnxruntime was imported before sdlora_edge, so it may send telemetry:"
            " import sdlora_edge first, or set ORT_DISABLE_TELEMETRY=1 in the environment"
        )

_MODULES = {
    "train.settings": ("Settings",),
    "train.loop": ("add_task", "resume", "train"),
    "train.evaluator": ("evaluate",),
    "train.plan": ("ClassChanges",),
    "train.run": ("Run",),
    "formats.signing": ("new_key",),
    "formats.bundle": ("open_bundle",),
    "export.bundles": ("export_bundle",),
    "export.packets": ("build_packets",),
    "export.requests": ("ExportOptions", "PacketOptions"),
    "export.issuing": ("KeyChange", "revoke", "rotate_keys", "sign_packet", "squash_packets"),
    "device.device": ("Device",),
    "device.answers": ("Prediction",),
    "device.watch.service": ("watch",),
    "results": ("Status",),
    "errors": (
        *("HealthError", "InputError", "NotForThisDevice", "NothingToDo"),
        *("ResourceError", "SdloraError", "TrustError", "UsageError"),
    ),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ClassChanges",
    "Device",
    "ExportOptions",
    "HealthError",
    "InputError",
    "KeyChange",
    "NotForThisDevice",
    "NothingToDo",
    "PacketOptions",
    "Prediction",
    "ResourceError",
    "Run",
    "SdloraError",
    "Settings",
    "Status",
    "TrustError",
    "UsageError",
    "add_task",
    "build_packets",
    "evaluate",
    "export_bundle",
    "new_key",
    "open_bundle",
    "resume",
    "revoke",
    "rotate_keys",
    "sign_packet",
    "squash_packets",
    "train",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Execution providers of ONNX Runtime: what computes a model in place of its CPU kernels.

A provider is chosen by name, and never replaced in silence: if it is not installed, cannot load the
model or takes no part of it, opening the store fails. Whether it computes what the host computed is
the canary's business. docs/guides/execution-providers.md says which of them were tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...errors import InputError, UsageError

PROVIDER = "SDLORA_EDGE_ONNX_PROVIDER"
"""Environment variable with the provider of every command and program on this machine."""
CPU = "cpu"
RECORD = "session.record_ep_graph_assignment_info"
"""Configuration entry: the session remembers which provider took which part of the model."""
_registering = threading.Lock()
_registered = set[str]()
"""plugins, in this process"""


def _none(threads: int) -> dict[str, str]:
    return {}


def _cuda(threads: int) -> dict[str, str]:
    return {"use_tf32": "0"}  # its 10 bits are beyond the tolerance of fp32


def _openvino(threads: int) -> dict[str, str]:
    # Where a processor has bfloat16 it would use it, with errors beyond the tolerance of fp32.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    return {"load_config": json.dumps({"CPU": settings})}


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Args:
        name: Ours.
        full: ONNX Runtime's.
        package: What brings it.
        options: Its options, from the number of threads (0: the provider's choice).
        plugin: The module of a package that holds the provider alone; "" if ONNX Runtime itself is
            built with it.
    """

    name: str
    full: str
    package: str
    options: Callable[[int], dict[str, str]] = _none
    plugin: str = ""

    def add(self, ort: Any, options: Any, threads: int) -> dict[str, Any]:
        """Make a session use it.

        Args:
            ort: The module onnxruntime.
            options: The session's options.
            threads: As in `Engine`.

        Returns:
            More arguments of the session.

        Raises:
            InputError: It is not installed.
        """
        if self.name == CPU:
            return {"providers": [self.full]}
        options.add_session_config_entry(RECORD, "1")
        settings = self.options(threads)
        if self.plugin:
            options.add_provider_for_devices(self._devices(ort)[:1], settings)
            return {}
        if self.full not in ort.get_available_providers():
            raise self._missing(f"it has {', '.join(ort.get_available_providers())}")
        return {"providers": [(self.full, settings)]}

    def require_used(self, session: Any) -> None:
        """Raises InputError if ONNX Runtime fell back to its CPU kernels for the whole model."""
        if self.name == CPU:
            return
        used = set(session.get_providers())
        # Older versions cannot tell who took what.
        with contextlib.suppress(AttributeError):
            used &= {part.ep_name for part in session.get_provider_graph_assignment_info()}
        if self.full not in used:
            raise InputError(
                f"provider {self.name} takes no part of this model: choose another one, "
                f"or --provider {CPU}"
            )

    def _devices(self, ort: Any) -> list[Any]:
        """The processors that a plugin can compute on; the first is the CPU."""
        with _registering:
            if not (found := self._found(ort)):
                self._register(ort)
                found = self._found(ort)
        if not found:  # OpenVINO, for one, knows Intel's processors alone
            raise InputError(
                f"provider {self.name} finds no processor that it knows: use --provider {CPU}"
            )
        return sorted(found, key=lambda one: one.ep_metadata.get("ov_device") != "CPU")

    def _register(self, ort: Any) -> None:
        """Once in a process: ONNX Runtime refuses to do it again."""
        if self.plugin in _registered:
            return
        try:
            library = import_module(self.plugin).get_library_path()
            ort.register_execution_provider_library(self.plugin, library)
        except (ImportError, AttributeError) as error:
            raise self._missing(str(error)) from error
        _registered.add(self.plugin)

    def _found(self, ort: Any) -> list[Any]:
        devices = ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else []
        return [one for one in devices if one.ep_name == self.full]

    def _missing(self, said: str) -> InputError:
        return InputError(
            f"ONNX Runtime has no provider {self.name} here ({said}): install {self.package}, "
            f"or use --provider {CPU}"
        )


PROVIDERS = {
    one.name: one
    for one in (
        Provider(CPU, "CPUExecutionProvider", "onnxruntime"),
        Provider("cuda", "CUDAExecutionProvider", "onnxruntime-gpu", _cuda),
        Provider("tensorrt", "TensorrtExecutionProvider", "onnxruntime-gpu and TensorRT"),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "onnxruntime-ep-openvino, and onnxruntime 1.23 or newer",
            _openvino,
            "onnxruntime_ep_openvino",
        ),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime on macOS"),
        Provider("qnn", "QNNExecutionProvider", "onnxruntime-qnn", plugin="onnxruntime_qnn"),
    )
}


def named(name: str) -> Provider:
    """A provider; "" for the one that the environment names, else the CPU.

    Raises UsageError if there is none of that name.
    """
    chosen = name or os.environ.get(PROVIDER, "") or CPU
    if chosen not in PROVIDERS:
        told = f"provider {chosen!r}" if name else f"{PROVIDER}: provider {chosen!r}"
        raise UsageError(f"{told} is unknown: choose {', '.join(PROVIDERS)}")
    return PROVIDERS[chosen]

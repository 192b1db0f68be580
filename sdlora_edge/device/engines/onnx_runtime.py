"""ONNX Runtime.

If weights are inputs, one session serves forever and an update feeds other values. If they are
constants, an update makes a session beside the old one, with new values in place of those in the
file.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError, UsageError
from ...formats.bundle import CONSTANTS, DTYPES, HEAD_BIAS, Bundle
from ...inputs.modality import Inputs
from ...platforms import cannot_import
from ...shortage import verdict
from . import Engine, Outputs, with_room
from .providers import CPU, named

try:
    import onnxruntime as ort
except ImportError as error:
    raise verdict(error, InputError(cannot_import(error))) from error

MODEL = "model.onnx"
LOGITS, FEATURES = "logits", "features"
"""the model's outputs"""
CONFIG = "SDLORA_EDGE_ONNX_CONFIG"
"""Environment variable with more entries of the session's configuration: NAME=VALUE, separated by
spaces."""
ARENA = "SDLORA_EDGE_ONNX_ARENA"
"""Environment variable: with 0, ONNX Runtime gives memory back after each prediction, which takes a
few per cent more time."""
CRASHES = (1, 23), (1, 30)
"""From the first version to below the second, ONNX Runtime dies (SIGSEGV) when a session with
float16 inputs that have defaults opens with ORT_ENABLE_ALL. ORT_ENABLE_EXTENDED gives the same
logits (docs/platforms.md)."""
ERROR_LEVEL = 3
"""Below this level, ONNX Runtime warns once for each overridable initializer."""


class _Loaded(NamedTuple):
    session: ort.InferenceSession
    feed: dict[str, ort.OrtValue]
    """What the session is fed in addition to the images."""
    classes: int
    features: bool
    """Whether the model has the output FEATURES."""


class OnnxEngine(Engine):
    """Runs model.onnx."""

    takes_provider = True

    def __init__(self, bundle: Bundle, threads: int, workspace: Path, provider: str = "") -> None:
        self._provider = named(provider)
        if self._provider.name != CPU:
            self.advice = f"use --provider {CPU}"
        self._path = bundle.path / MODEL
        self._threads = threads
        self._capacity = bundle.manifest.capacity
        self._dtypes = {
            name: DTYPES[entry["dtype"]] for name, entry in bundle.manifest.weights.items()
        }
        if bundle.manifest.precision == "int8-dynamic" and platform.machine() == "aarch64":
            self.advice = (
                "if this processor has SME, set "
                f"{CONFIG}=mlas.disable_kleidiai=1 in the environment"
            )
        self._session = None if bundle.manifest.weights_as == CONSTANTS else self._open({})

    def load(self, weights: Mapping[str, np.ndarray]) -> _Loaded:
        # No copy if an array has the right dtype already: an OrtValue refers to numpy's memory.
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(with_room(name, array, self._capacity), self._dtypes[name])
            )
            for name, array in weights.items()
        }
        session, feed = (self._session, values) if self._session else (self._open(values), {})
        features = FEATURES in [output.name for output in session.get_outputs()]
        return _Loaded(session, feed, len(weights[HEAD_BIAS]), features)

    def outputs(self, loaded: _Loaded, inputs: Inputs) -> Outputs:
        feed = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in inputs.items()
        } | loaded.feed
        names = [LOGITS, FEATURES] if loaded.features else [LOGITS]
        found = loaded.session.run_with_ort_values(names, feed)
        logits, *more = (np.asarray(one.numpy(), np.float32) for one in found)
        return Outputs(logits[:, : loaded.classes], *more)

    def _open(self, constants: dict[str, ort.OrtValue]) -> ort.InferenceSession:
        """A session with these values in place of the file's own.

        ONNX Runtime checks their shapes.
        """
        options = self._options(fixed=bool(constants))
        if constants:
            options.add_external_initializers(list(constants), list(constants.values()))
        chosen = self._provider
        more = chosen.add(ort, options, self._threads)
        try:
            session = ort.InferenceSession(str(self._path), options, **more)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise verdict(error, self._unloaded(error)) from error
        chosen.require_used(session)
        taken = [*session.get_overridable_initializers(), *session.get_inputs()]
        if not constants and (unknown := set(self._dtypes) - {value.name for value in taken}):
            raise InputError(
                f"{MODEL} takes no weight {', '.join(sorted(unknown))} as an input: "
                "export the bundle again"
            )
        return session

    def _unloaded(self, error: Exception) -> InputError:
        told = f"{self._path}: ONNX Runtime cannot load it"
        if self._provider.name == CPU:
            return InputError(f"{told}: {error}")
        return InputError(
            f"{told} with provider {self._provider.name}: {error}: use --provider {CPU}, "
            f"or export the bundle with --weights-as {CONSTANTS}"
        )

    def _options(self, fixed: bool) -> ort.SessionOptions:
        """Options of a session. fixed: whether the weights are constants."""
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_LEVEL
        options.intra_op_num_threads = self._threads
        options.enable_cpu_mem_arena = os.environ.get(ARENA) != "0"
        # Unpack int8 weights once, when the session opens. Otherwise activations would be rounded
        # to int8 as well.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        for name, value in more_configuration().items():
            try:
                options.add_session_config_entry(name, value)
            except Exception as error:  # onnxruntime's exceptions have no common base but Exception
                raise UsageError(
                    f"{CONFIG}: ONNX Runtime refuses {name[:80]!r} ({error}): correct or remove it"
                ) from error
        if not fixed and np.float16 in self._dtypes.values() and crashes(ort.__version__):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        return options


def crashes(version: str) -> bool:
    """Whether this version of ONNX Runtime is one of `CRASHES`."""
    first, below = CRASHES
    return first <= tuple(map(int, re.findall(r"\d+", version)[:2])) < below


def more_configuration() -> dict[str, str]:
    """The entries in `CONFIG`. Raises UsageError if one is malformed."""
    entries = os.environ.get(CONFIG, "").split()
    if wrong := [entry for entry in entries if not re.fullmatch("[^=]+=.+", entry)]:
        raise UsageError(f"{CONFIG} holds {wrong[0]!r}: write NAME=VALUE, separated by spaces")
    return dict(entry.split("=", 1) for entry in entries)

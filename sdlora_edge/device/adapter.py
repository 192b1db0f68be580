"""A device's weights as an `.onnx_adapter` file, by which ONNX Runtime's C, C++ and Python API runs the bundle's model.onnx.

Its parameters are the model's overridable initializers, already merged (W_t, head), so a program needs this file, the bundle
and three lines: load the adapter, add it to the run options, run. (ONNX Runtime for JavaScript, 1.30 at least, has no such API,
and ignores the weights without an error if they are fed as inputs.) ONNX Runtime reads it without checksum or signature: make it
where the packets were verified, and keep it as safe as the model. It does nothing where inputs are bound with IOBinding. With
an int8 bundle, give the session the configuration entry session.disable_quant_qdq = 1, as `engines.onnx` does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StorageError, UsageError
from ..formats.bundle import DTYPES, INPUTS, Bundle
from ..shortage import verdict
from ..storage import atomic
from .device import Device
from .engines import with_room
from .engines.onnx_runtime import ort  # type: ignore[attr-defined]

SUFFIX = ".onnx_adapter"


def export_adapter(device: Device, out: Path) -> dict[str, Any]:
    """Write the generation in force. Raises UsageError where the bundle's model takes no adapter, StorageError."""
    state, weights = device.current()
    size = write_adapter(device.bundle, weights, state.task, out)
    return {
        "adapter": str(out),
        "task": state.task,
        "state": state.digest,
        "classes": list(state.classes),
        "bytes": size,
    }


def write_adapter(bundle: Bundle, weights: Mapping[str, np.ndarray], task: int, out: Path) -> int:
    """Write merged weights (and head) under the names of the model's overridable initializers; returns the file's bytes.

    The file's adapter version is `task`, its model version the task of the bundle: what the weights are, and what they are for.
    """
    manifest = bundle.manifest
    if manifest.target != "onnx" or manifest.weights_as != INPUTS:
        raise UsageError(
            f"{bundle.path} (target {manifest.target}, weights as {manifest.weights_as}) takes no {SUFFIX} file: "
            f"export one with --target onnx --weights-as {INPUTS}"
        )
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(task)
    adapter.set_model_version(manifest.task)
    stored = {
        n: np.ascontiguousarray(
            with_room(n, w, manifest.capacity), DTYPES[manifest.weights[n]["dtype"]]
        )
        for n, w in weights.items()
    }
    adapter.set_parameters(
        {name: ort.OrtValue.ortvalue_from_numpy(w) for name, w in stored.items()}
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=atomic.TEMPORARY, dir=out.parent) as folder:
            adapter.export_adapter(str(Path(folder) / out.name))
            data = (Path(folder) / out.name).read_bytes()
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise verdict(error, StorageError(f"{out} cannot be written: {error}")) from error
    atomic.write(out, data)  # whole, or not at all
    return len(data)

"""A device's weights as an `.onnx_adapter` file, for programs that run model.onnx themselves.

They use ONNX Runtime's C, C++ or Python API.

Its parameters are the model's overridable initializers, already merged (W_t, head). So a program
needs this file, the bundle and three lines: load the adapter, add it to the run options, run. ONNX
Runtime for JavaScript (1.30 at least) has no such API, and ignores the weights without an error if
they are fed as inputs. An adapter has no effect if inputs are bound with IOBinding. With an int8
bundle, give the session the configuration entry session.disable_quant_qdq = 1, as
`engines.onnx_runtime` does.

ONNX Runtime reads the file without checksum or signature, and accepts the adapter of another run in
silence. So `current.json` beside it says what it is, and how logits become a probability and
`unknown` (docs/packet.md). Make the adapter where the packets were
verified, and keep it as safe as the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StorageError, UsageError
from ..formats.bundle import DTYPES, INPUTS, Bundle
from ..formats.canonical import sha256
from ..formats.current import Current
from ..results import Result
from ..shortage import verdict
from ..state import TaskState
from ..storage import atomic
from .device import Device
from .engines import with_room
from .engines.onnx_runtime import ort  # type: ignore[attr-defined]

SUFFIX = ".onnx_adapter"


@dataclass(frozen=True)
class ExportedAdapter(Result):
    """An adapter file.

    Args:
        adapter: The file; current.json lies beside it.
        task: The task it holds.
        state: State digest of that task.
        classes: Names of the live classes.
        bytes: Size of the file.
    """

    adapter: Path
    task: int
    state: str
    classes: tuple[str, ...]
    bytes: int


def export_adapter(device: Device, out: Path) -> ExportedAdapter:
    """Write the generation in force, and current.json beside it.

    Raises:
        UsageError: The bundle's model takes no adapter.
        StorageError: The file cannot be written.
    """
    state, weights = device.current()
    size = write_adapter(device.bundle, weights, state, out)
    return ExportedAdapter(out, state.task, state.digest, device.status().classes, size)


def write_adapter(
    bundle: Bundle, weights: Mapping[str, np.ndarray], state: TaskState, out: Path
) -> int:
    """Write an adapter, then current.json beside it.

    A reader that loads both compares the SHA-256: between the two renames, current.json still
    describes the old adapter.

    Args:
        bundle: The bundle whose model takes it.
        weights: Merged weights and head, float32, by the names of the model's overridable
            initializers.
        state: What they are the weights of. Its task is the file's adapter version; the bundle's
            task is its model version.
        out: The file.

    Returns:
        The file's size in bytes.
    """
    manifest = bundle.manifest
    if manifest.target != "onnx" or manifest.weights_as != INPUTS:
        raise UsageError(
            f"{bundle.path} (target {manifest.target}, weights as {manifest.weights_as}) takes no "
            f"{SUFFIX} file: export a bundle with --target onnx --weights-as {INPUTS}"
        )
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(state.task)
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
    atomic.write(out, data)  # complete, or not at all
    Current.of(manifest.lineage, state, {out.name: sha256(data)}).write(out.parent)
    return len(data)

"""A device's weights as one file, for a program in another language that runs the model itself.

    adapter       .onnx_adapter, for ONNX Runtime's C, C++, C# and Python API: load the adapter, add
                  it to the run options, run
    safetensors   for every other runtime: the tensors by name, as the bundle's model takes them
    ptd           for ExecuTorch: the bundle's model.ptd with these values

Each holds the model's adapted weights and head, already merged (W_t). None says which run, task or
classes they belong to, and ONNX Runtime accepts the adapter of another run in silence. So
`current.json` beside the file says what it is, and how logits become a probability and `unknown`
(docs/packet.md). Export where the packets were verified, and keep the file as safe as the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from ..errors import StorageError, UsageError
from ..formats.bundle import DTYPES, INPUTS, Bundle
from ..formats.canonical import sha256
from ..formats.current import CURRENT, Current
from ..results import Result
from ..shortage import verdict
from ..state import TaskState
from ..storage import atomic
from .device import Device
from .engines import with_room

Weights = Mapping[str, np.ndarray]
"""{tensor: float32}: merged weights and head, by the names of the model's own"""


@dataclass(frozen=True)
class ExportedWeights(Result):
    """A file of weights.

    Args:
        file: Its path; current.json lies beside it.
        format: One of `FORMATS`.
        lineage: State digest S_0.
        task: The task it holds.
        state: State digest of that task.
        classes: Names of the live classes.
        bytes: Size of the file.
        sha256: Its digest, as in current.json.
    """

    file: Path
    format: str
    lineage: str
    task: int
    state: str
    classes: tuple[str, ...]
    bytes: int
    sha256: str


def export_weights(device: Device, kind: str, out: Path) -> ExportedWeights:
    """Write the weights of the generation in force, and current.json beside them.

    Args:
        device: An opened device.
        kind: One of `FORMATS`.
        out: The file.

    Raises:
        UsageError: The format is unknown, or is not for this bundle.
        StorageError, ResourceError: The file cannot be written.
    """
    state, weights = device.current()
    data = write_weights(device.bundle, weights, state, (kind, out))
    lineage = device.bundle.manifest.lineage
    size, digest = len(data), sha256(data)
    return ExportedWeights(
        out, kind, lineage, state.task, state.digest, tuple(state.names), size, digest
    )


def write_weights(
    bundle: Bundle, weights: Weights, state: TaskState, target: tuple[str, Path]
) -> bytes:
    """Write a file of weights, then current.json beside it.

    A reader that loads both compares the SHA-256: between the two renames, current.json still
    describes the old file.

    Args:
        bundle: The bundle whose model takes them.
        weights: Merged weights and head.
        state: What they are the weights of.
        target: Format and file.

    Returns:
        The file's content.
    """
    kind, out = target
    if kind not in FORMATS:
        raise UsageError(f"format {kind!r} is unknown: choose {', '.join(FORMATS)}")
    if out.name == CURRENT:
        raise UsageError(f"{out} has the name of the description: choose another name")
    data = FORMATS[kind](bundle, weights, state)
    atomic.write(out, data)  # complete, or not at all
    current = Current.of(bundle.manifest.lineage, state, {out.name: sha256(data)})
    current.write(out.parent)
    return data


def _stored(bundle: Bundle, weights: Weights) -> dict[str, np.ndarray]:
    """In the model's own shapes and dtypes."""
    manifest = bundle.manifest
    return {
        name: np.ascontiguousarray(
            with_room(name, weight, manifest.capacity), DTYPES[manifest.weights[name]["dtype"]]
        )
        for name, weight in weights.items()
    }


def _safetensors(bundle: Bundle, weights: Weights, state: TaskState) -> bytes:
    """If the head has room for a fixed number of classes, these are bytes that could take the place
    of the bundle's weights.safetensors: `export.onnx` lays that file out in the same way."""
    return safetensors.numpy.save(_stored(bundle, weights))


def _adapter(bundle: Bundle, weights: Weights, state: TaskState) -> bytes:
    """Adapter version: the task. Model version: the bundle's task."""
    manifest = bundle.manifest
    if manifest.target != "onnx" or manifest.weights_as != INPUTS:
        raise _refused(bundle, "adapter", f"--target onnx --weights-as {INPUTS}")
    from .engines.onnx_runtime import ort  # type: ignore[attr-defined]

    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(state.task)
    adapter.set_model_version(manifest.task)
    stored = _stored(bundle, weights)
    adapter.set_parameters(
        {name: ort.OrtValue.ortvalue_from_numpy(weight) for name, weight in stored.items()}
    )
    with tempfile.TemporaryDirectory(dir=atomic.temporary()) as folder:
        file = Path(folder) / "a.onnx_adapter"
        try:
            adapter.export_adapter(str(file))
            return file.read_bytes()
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise verdict(error, StorageError(f"{file} cannot be written: {error}")) from error


def _ptd(bundle: Bundle, weights: Weights, state: TaskState) -> bytes:
    if bundle.manifest.target != "executorch":
        raise _refused(bundle, "ptd", "--target executorch")
    from .engines.executorch_runtime import DATA, patched

    path = bundle.path / DATA
    with atomic.reading(path), open(path, "rb") as file:
        return b"".join(patched(file, bundle.manifest.weights, weights, bundle.manifest.capacity))


def _refused(bundle: Bundle, kind: str, remedy: str) -> UsageError:
    manifest = bundle.manifest
    return UsageError(
        f"{bundle.path} (target {manifest.target}, weights as {manifest.weights_as}) takes no file "
        f"of format {kind}: export a bundle with {remedy}, or choose another format"
    )


FORMATS: dict[str, Callable[[Bundle, Weights, TaskState], bytes]] = {
    "safetensors": _safetensors,
    "adapter": _adapter,
    "ptd": _ptd,
}

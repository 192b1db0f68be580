"""The bundle: an exported model, its manifest, and the keys that its devices trust.

Imports numpy only.

    manifest.json         facts about the model (`Manifest`) and the digest of every other file
    model files           of the target: model.onnx, or model.pte and model.ptd
    weights               W_e of every adapted weight, `head.weight` and `head.bias`, raw, in one of
                          these files or in weights.safetensors: the manifest says where. Engine and
                          device read this one copy.
    factors.safetensors   <k>.<projection>.A/.B of the tasks 1..e as shipped, `canary.logits`, and
                          the five tensors of `Confidence`
    classes.json          the class names in the order of the head's rows, for any program
    trust.json            public keys and threshold

The bundle id is the SHA-256 of manifest.json. docs/packet.md describes every field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..errors import InputError, NotForThisDevice
from ..shortage import verdict
from ..state import Merging, TaskState, extended, factors_from
from ..storage import atomic
from . import encoding as encodings
from .bounds import confidence_bounds
from .canonical import dump_json, parse_exact_json, sha256
from .confidence import Confidence
from .encoding import Factors
from .limits import LIMITS
from .manifest import (
    CLASSES,
    CONSTANTS,
    DTYPES,
    FACTORS,
    FLEET_ROOT,
    FORMAT,
    HEAD_BIAS,
    HEAD_WEIGHT,
    INPUTS,
    MANIFEST,
    MANIFEST_LIMIT,
    PLAIN_INPUTS,
    TRUST,
    Canary,
    Manifest,
)
from .packet import name_problem
from .signing import Trust

__all__ = [
    "CLASSES",
    "CONSTANTS",
    "DTYPES",
    "FACTORS",
    "FLEET_ROOT",
    "FORMAT",
    "HEAD_BIAS",
    "HEAD_WEIGHT",
    "INPUTS",
    "MANIFEST",
    "PLAIN_INPUTS",
    "TRUST",
    "Bundle",
    "Canary",
    "Manifest",
    "classes_json",
    "describe",
    "load_tensors",
    "open_bundle",
    "read_classes",
]
CLASSES_FORMAT = "sdlora-edge/classes/1"
CANARY_LOGITS = "canary.logits"
_UNREADABLE = (OSError, safetensors.SafetensorError, AttributeError, TypeError, ValueError)
"""What safetensors raises; the last three for dtypes that numpy does not have, such as float8."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: every file has been compared with the manifest.

    Args:
        path: The folder.
        id: SHA-256 of manifest.json.
        manifest: Its facts.
        trust: The keys a device starts with.
        weights: {tensor: float32 (rows, columns)}, W_e.
        state: Task e.
        factors: One mapping for each of the tasks 1..e.
        canary_logits: float32 (count, live classes).
    """

    path: Path
    id: str
    manifest: Manifest
    trust: Trust
    weights: Mapping[str, np.ndarray]
    state: TaskState
    factors: tuple[Mapping[str, Factors], ...]
    canary_logits: np.ndarray

    def merged(
        self, state: TaskState, factors: Sequence[Mapping[str, Factors]]
    ) -> Mapping[str, np.ndarray]:
        """W_t and the head of a later state, float32, each computed when it is read.

        Args:
            state: The later state.
            factors: Of the tasks after e, in order.
        """
        weights = {**self.weights, HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
        coefficients = state.magnitudes - extended(self.state.magnitudes, state.magnitudes)
        return Merging(weights, self.manifest.projections, [*self.factors, *factors], coefficients)

    @property
    def model_bytes(self) -> int:
        """Bytes of graph and weights: what shipping the whole model instead would cost."""
        own = (TRUST, FACTORS, CLASSES, FLEET_ROOT)
        return sum(int(f["size"]) for name, f in self.manifest.files.items() if name not in own)

    def require_room(self, classes: int) -> None:
        """Raises NotForThisDevice if the model has no room for this number of head rows."""
        if 0 < self.manifest.capacity < classes:
            raise NotForThisDevice(
                f"{classes} classes exceed this bundle's capacity of {self.manifest.capacity}: "
                f"export a bundle with --max-classes {classes} or more"
            )


def open_bundle(path: Path | str) -> Bundle:
    """Read a bundle after every file has been compared with the manifest.

    Raises:
        InputError: A file is missing, damaged or contradicts the manifest; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is not a bundle: no such folder; make one with sdlora-edge export"
        )
    data = atomic.read(path / MANIFEST, MANIFEST_LIMIT)
    manifest = Manifest.from_json(data)
    for name, entry in manifest.files.items():
        if atomic.sha256_of(path / name) != (entry["sha256"], entry["size"]):
            raise InputError(
                f"{path / name} is not the file the manifest names: get the bundle again"
            )
    trust = Trust.from_dict(parse_exact_json(atomic.read(path / TRUST), TRUST))
    classes = read_classes(atomic.read(path / CLASSES, MANIFEST_LIMIT))
    stored = load_tensors(path / FACTORS)
    try:
        weights = {name: _load_raw(path, entry) for name, entry in manifest.weights.items()}
        state = _state(manifest, classes, weights, _confidence(stored, classes, weights))
        names = [p.name for p in manifest.projections]
        factors = tuple(
            factors_from(stored, names, f"{k}.", manifest.encoding)
            for k in range(1, manifest.task + 1)
        )
        for k, own in enumerate(factors, 1):
            _require_shapes(k, own, manifest)
        logits = _canary_logits(stored, manifest, classes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: manifest and files contradict each other: {error}") from error
    return Bundle(path, sha256(data), manifest, trust, weights, state, factors, logits)


def classes_json(classes: Sequence[str | None]) -> bytes:
    """classes.json: the name of each head row, None for a retired one."""
    return dump_json({"format": CLASSES_FORMAT, "classes": list(classes)})


def read_classes(data: bytes) -> tuple[str | None, ...]:
    """The class of each head row, in order; None for a retired one. Raises InputError."""
    value = parse_exact_json(data, CLASSES)
    if (found := value.get("format")) != CLASSES_FORMAT:
        raise InputError(f"{CLASSES} has format {found!r}, not {CLASSES_FORMAT!r}: export it again")
    if unknown := sorted(value.keys() - {"format", "classes"}):
        raise InputError(f"{CLASSES} has an unknown field {unknown[0]!r}: export it again")
    names = value.get("classes")
    if not isinstance(names, list) or len(names) > LIMITS.rows:
        raise InputError(f"{CLASSES} holds no list of at most {LIMITS.rows} classes")
    live = [name for name in names if name is not None]
    for name in live:
        if problem := name_problem(name):
            raise InputError(f"{CLASSES}: the class name {name!r} {problem}: export it again")
    if len(set(live)) != len(live):
        raise InputError(f"{CLASSES} holds a class name twice: export it again")
    return tuple(names)


def _state(
    manifest: Manifest,
    classes: tuple[str | None, ...],
    weights: dict[str, np.ndarray],
    confidence: Confidence,
) -> TaskState:
    """The state of task e.

    Takes the head out of `weights`. Raises KeyError, ValueError if shapes do not fit.
    """
    known = len(classes)
    weight, bias = weights.pop(HEAD_WEIGHT)[:known], weights.pop(HEAD_BIAS)[:known]
    if weight.ndim != 2 or len(weight) != known or bias.shape != (known,):
        raise ValueError(f"head {weight.shape} and {bias.shape} for {known} classes")
    for p in manifest.projections:
        if weights[p.tensor].shape[1:] != (p.columns,) or p.stop > len(weights[p.tensor]):
            raise ValueError(
                f"projection {p.name} does not fit {p.tensor} {weights[p.tensor].shape}"
            )
    magnitudes = np.array(manifest.magnitudes, np.float64)
    *before, digest = manifest.states
    return TaskState(
        manifest.task,
        manifest.task_name,
        digest,
        classes,
        magnitudes,
        weight,
        bias,
        {},
        confidence,
        tuple(before),
    )


def _require_shapes(task: int, factors: Mapping[str, Factors], manifest: Manifest) -> None:
    """Raises ValueError, TypeError unless the factors of a task fit their projections.

    They are used only once a later task changes their magnitudes: a fault must not wait until then.
    """
    encoding = manifest.encoding
    for p in (p for p in manifest.projections if p.name in factors):
        stored, rows = factors[p.name].stored, p.stop - p.start
        if encoding == "int4" and (p.columns % 2 or rows % 2):
            raise ValueError(f"{p.name} has an odd width, which int4 cannot carry")
        rank = len(stored["A"])
        for part, shape in encodings.shapes(encoding, rank, rows, p.columns).items():
            dtypes = encodings.SCALE_DTYPES if part.endswith(".scale") else encodings.DTYPES
            array = stored[part]
            if not rank or array.dtype != dtypes[encoding] or array.shape != shape:
                raise ValueError(f"{task}.{p.name}.{part} is {array.dtype} {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{task}.{p.name}.{part} holds a number that is not finite")


def _canary_logits(
    stored: Mapping[str, np.ndarray], manifest: Manifest, classes: Sequence[str | None]
) -> np.ndarray:
    """float32 (count, live classes). Raises KeyError, ValueError."""
    logits = stored[CANARY_LOGITS]
    live = sum(name is not None for name in classes)
    if logits.dtype != np.float32 or logits.shape != (manifest.canary.count, live):
        raise ValueError(f"{CANARY_LOGITS} {logits.dtype} {logits.shape} for {live} classes")
    if not (np.abs(logits) <= LIMITS.logit).all():
        raise ValueError(f"{CANARY_LOGITS} holds a number that is not finite, or too large")
    return logits


def _confidence(
    stored: Mapping[str, np.ndarray],
    classes: Sequence[str | None],
    weights: Mapping[str, np.ndarray],
) -> Confidence:
    """What the state of task e knows of its own answers. Raises KeyError, ValueError."""
    found = Confidence.from_tensors(stored)
    live, features = sum(name is not None for name in classes), weights[HEAD_WEIGHT].shape[1]
    for tensor in confidence_bounds(found, live, features):
        if tensor.problem:
            raise ValueError(tensor.problem)
    return found


def _load_raw(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """A weight from its place in a file, as float32.

    Raises ValueError if the file ends before it.
    """
    count = int(np.prod(entry["shape"], dtype=object))
    with open(path / entry["file"], "rb") as file:
        raw = np.fromfile(file, DTYPES[entry["dtype"]], count, offset=entry["offset"])
    return raw.reshape(entry["shape"]).astype(np.float32, copy=False)


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file as numpy arrays. Raises InputError."""
    try:
        return dict(safetensors.numpy.load_file(path))
    except _UNREADABLE as error:
        raise verdict(
            error, InputError(f"{path} is not a readable safetensors file: {error}")
        ) from error


def describe(path: Path) -> dict[str, Any]:
    """The manifest's entry for one file."""
    digest, size = atomic.sha256_of(path)
    return {"sha256": digest, "size": size}

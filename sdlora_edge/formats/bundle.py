"""What a device is flashed with: an exported model, its manifest, and the keys it obeys. numpy only.

    manifest.json         everything a device must know (the fields of `Manifest`), with the digest of every other file
    the model             the target's own files: model.onnx, or model.pte and model.ptd
    weights               W_e of every adapted weight, `head.weight`, `head.bias`, raw in one of these files or in
                          weights.safetensors, where the manifest says: one copy, read by the engine and by us
    factors.safetensors   <k>.<projection>.A/.B of the tasks up to e, as shipped
    trust.json            public keys and threshold

The bundle id is the SHA-256 of manifest.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..errors import InputError, NotForThisDevice
from ..shortage import verdict
from ..state import Merging, Projection, TaskState, extended, factors_from
from ..storage import atomic
from .canonical import dump_json, is_sha256, parse_json, sha256, to_units
from .container import natural
from .encoding import ENCODINGS, Factors
from .packet import magnitudes_from, name_problem
from .signing import Trust

FORMAT = "sdlora-edge/bundle/3"
MANIFEST, TRUST, FACTORS = "manifest.json", "trust.json", "factors.safetensors"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
INPUTS, CONSTANTS = "inputs", "constants"
"""how the model holds its adapted weights: as inputs with defaults, or as constants that a new session is made with"""
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""of the weights in a model's files; they are computed in float32, whatever they are stored in"""
MANIFEST_LIMIT = 64 * 1024 * 1024
"""bytes"""


@dataclass(frozen=True)
class Manifest:
    """The facts about an exported model. `state` is S_e, `task` is e, `magnitudes` alpha_k(e) for k = 1..e, each a number or,
    where projections have their own, a list of one for each.

    revisions: of the tasks 1 to e. precision: of what is not adapted. tolerance: the largest logit difference to torch it may show on
    images (`export.precision`); min_agreement: the least share of them that gets the same class. weights_as: INPUTS or CONSTANTS. capacity: how many classes the model has room for; 0 where it has room for any number.
    weights: {tensor: {"file", "offset", "dtype", "shape"}}, where it lies raw, row by row, little endian; the head fills
    the first rows of its capacity. preprocessing: the fields of `device.preprocessing.Preprocessing`.
    canary: {"seed": int, "logits": [[float]], "tolerance": float}, what the host got for the canary inputs, and the largest
    difference that a device may find, as `device.canary` measures it (left out: the other tolerance). made_with: versions.
    files: {name: {"sha256", "size"}}.
    """

    lineage: str
    state: str
    states: tuple[str, ...]
    task: int
    task_name: str
    model: str
    target: str
    precision: str
    tolerance: float
    weights_as: str
    capacity: int
    encoding: str
    classes: tuple[str | None, ...]
    magnitudes: tuple[Any, ...]
    preprocessing: Mapping[str, Any]
    projections: tuple[Projection, ...]
    weights: Mapping[str, Mapping[str, Any]]
    canary: Mapping[str, Any]
    made_with: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    revisions: tuple[int, ...] = ()
    min_agreement: float = 1.0

    @property
    def revision(self) -> int:
        """Of task e."""
        return self.revisions[-1] if self.revisions else 0

    def to_json(self) -> bytes:
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["projections"] = [p.to_dict() for p in self.projections]
        value["magnitudes"] = to_units(np.array(self.magnitudes, np.float64))
        return dump_json({"format": FORMAT, **value})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises InputError for another format version or a field that is missing or of the wrong kind."""
        value = parse_json(data, MANIFEST)
        if (found := value.pop("format", None)) != FORMAT:
            raise InputError(
                f"bundle format {found!r} is not {FORMAT!r}: export it again with this version"
            )
        try:
            manifest = cls(**value)
            _check_types(manifest)
            names = [name for name in manifest.classes if name is not None]
            if any(map(name_problem, names)) or len(set(names)) != len(names):
                raise ValueError("a class name is empty, malformed or stands twice")
            magnitudes = magnitudes_from(
                manifest.magnitudes, manifest.task, len(manifest.projections)
            )
            if not 0 < manifest.tolerance < 1:
                raise ValueError(f"tolerance {manifest.tolerance}")
            return replace(
                manifest,
                classes=tuple(manifest.classes),
                states=tuple(manifest.states),
                revisions=tuple(manifest.revisions),
                magnitudes=tuple(magnitudes.tolist()),
                projections=tuple(Projection.from_dict(p) for p in value["projections"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{MANIFEST} is not a bundle's manifest: {error!r}") from error


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: every file has been compared with the manifest.

    weights: {tensor: float32 (rows, columns)}, W_e. state: task e. factors: one mapping per task 1..e.
    """

    path: Path
    id: str
    manifest: Manifest
    trust: Trust
    weights: Mapping[str, np.ndarray]
    state: TaskState
    factors: tuple[Mapping[str, Factors], ...]

    def merged(
        self, state: TaskState, factors: Sequence[Mapping[str, Factors]]
    ) -> Mapping[str, np.ndarray]:
        """W_t and the head of a later state, float32, each computed when it is asked for. factors: of the tasks after e, in order."""
        weights = {**self.weights, HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
        coefficients = state.magnitudes - extended(self.state.magnitudes, state.magnitudes)
        return Merging(weights, self.manifest.projections, [*self.factors, *factors], coefficients)

    @property
    def model_bytes(self) -> int:
        """What shipping the whole model instead would cost: graph and weights."""
        return sum(
            int(f["size"])
            for name, f in self.manifest.files.items()
            if name not in (TRUST, FACTORS)
        )

    @property
    def canary_tolerance(self) -> float:
        """The largest difference of canaries, as `device.canary` measures it."""
        return float(self.manifest.canary.get("tolerance", self.manifest.tolerance))

    def require_room(self, classes: int) -> None:
        """Raises NotForThisDevice where the model has no room for so many classes."""
        if 0 < self.manifest.capacity < classes:
            raise NotForThisDevice(
                f"{classes} classes are beyond this bundle's capacity of {self.manifest.capacity}: "
                f"export one with --max-classes {classes} or more"
            )


def open_bundle(path: Path) -> Bundle:
    """Read a bundle, comparing every file with the manifest first. Raises InputError naming the file that is wrong."""
    if not path.is_dir():
        raise InputError(
            f"{path} is not a bundle: no such folder; make one with sdlora-edge export"
        )
    data = atomic.read(path / MANIFEST, MANIFEST_LIMIT)
    manifest = Manifest.from_json(data)
    for name, entry in manifest.files.items():
        if Path(name).name != name:
            raise InputError(f"{path / MANIFEST} names a file outside the bundle: {name!r}")
        if atomic.sha256_of(path / name) != (entry["sha256"], entry["size"]):
            raise InputError(
                f"{path / name} is not the file the manifest names: get the bundle again"
            )
    if missing := {TRUST, FACTORS, *(str(w.get("file")) for w in manifest.weights.values())} - set(
        manifest.files
    ):
        raise InputError(f"{path / MANIFEST} does not list {', '.join(sorted(missing))}")
    trust = Trust.from_dict(parse_json(atomic.read(path / TRUST), TRUST))
    stored = load_tensors(path / FACTORS)
    try:
        weights = {name: _load_raw(path, entry) for name, entry in manifest.weights.items()}
        known = len(manifest.classes)
        head_weight, head_bias = weights.pop(HEAD_WEIGHT)[:known], weights.pop(HEAD_BIAS)[:known]
        for p in manifest.projections:
            if weights[p.tensor].shape[1:] != (p.columns,) or p.stop > len(weights[p.tensor]):
                raise ValueError(
                    f"projection {p.name} does not fit {p.tensor} {weights[p.tensor].shape}"
                )
        if len(head_weight) != len(manifest.classes) or head_bias.shape != (len(manifest.classes),):
            raise ValueError(f"head {head_weight.shape} for {len(manifest.classes)} classes")
        names = [p.name for p in manifest.projections]
        factors = tuple(
            factors_from(stored, names, f"{k}.", manifest.encoding)
            for k in range(1, manifest.task + 1)
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: manifest and weights do not fit each other: {error!r}"
        ) from error
    magnitudes = np.array(manifest.magnitudes, np.float64)
    state = TaskState(
        manifest.task,
        manifest.task_name,
        manifest.state,
        manifest.classes,
        magnitudes,
        head_weight,
        head_bias,
        {},
        manifest.states[:-1],
    )
    return Bundle(path, sha256(data), manifest, trust, weights, state, factors)


def _check_types(manifest: Manifest) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless every field is of its kind."""
    for name in ("task_name", "model", "target", "precision", "encoding"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is not a text")
    if not (is_sha256(manifest.lineage) and is_sha256(manifest.state)):
        raise ValueError("lineage or state is no SHA-256")
    states = list(manifest.states)
    if len(states) != manifest.task + 1 or not all(map(is_sha256, states)):
        raise ValueError("states are not one SHA-256 for each task, and one before them")
    if (states[0], states[-1]) != (manifest.lineage, manifest.state):
        raise ValueError("states do not lead from the lineage to the state")
    for number in (manifest.task, manifest.capacity):
        if type(number) is not int or number < 0:
            raise ValueError(f"task or capacity {number!r}")
    if manifest.weights_as not in (INPUTS, CONSTANTS):
        raise ValueError(f"weights as {manifest.weights_as!r}")
    if manifest.weights_as == CONSTANTS and not manifest.capacity:
        raise ValueError("constants have no capacity")
    if manifest.capacity not in (0, manifest.weights[HEAD_WEIGHT]["shape"][0]):
        raise ValueError(
            f"a capacity of {manifest.capacity} for a head of {manifest.weights[HEAD_WEIGHT]['shape'][0]} rows"
        )
    if not (
        0 <= manifest.min_agreement <= 1
        and 0 < manifest.canary.get("tolerance", manifest.tolerance) < 1
    ):
        raise ValueError("bounds beyond 1")
    if 0 < manifest.capacity < len(manifest.classes):
        raise ValueError(f"{len(manifest.classes)} classes, but capacity for {manifest.capacity}")
    for name, entry in manifest.weights.items():
        whole = [entry["offset"], *entry["shape"]]
        if (
            entry["dtype"] not in DTYPES
            or not all(type(n) is int and n >= 0 for n in whole)
            or len(whole) not in (2, 3)
        ):
            raise ValueError(f"weight {name!r} has no place in a file")
        size = int(np.prod(entry["shape"], dtype=object)) * DTYPES[entry["dtype"]].itemsize
        if (
            entry["file"] in manifest.files
            and entry["offset"] + size > manifest.files[entry["file"]]["size"]
        ):
            raise ValueError(f"weight {name!r} lies beyond the end of {entry['file']}")
    if len(manifest.revisions) != manifest.task or sorted(map(natural, manifest.revisions)) != list(
        manifest.revisions
    ):
        raise ValueError(f"revisions {manifest.revisions!r} of {manifest.task} tasks")
    if manifest.encoding not in ENCODINGS:
        raise ValueError(f"encoding {manifest.encoding!r} is unknown")
    for name, entry in manifest.files.items():
        if not is_sha256(entry["sha256"]) or type(entry["size"]) is not int or "\0" in name:
            raise ValueError(f"file {name!r} has no digest and size")
    logits = np.array(manifest.canary["logits"], np.float32)
    if (
        type(manifest.canary["seed"]) is not int
        or logits.ndim != 2
        or logits.shape[1] != len([name for name in manifest.classes if name is not None])
    ):
        raise ValueError("the canary has no seed, or no logits for each class")


def _load_raw(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """A weight where the manifest says that it lies, as float32. Raises ValueError where the file ends before it."""
    count = int(np.prod(entry["shape"], dtype=object))
    with open(path / entry["file"], "rb") as file:
        raw = np.fromfile(file, DTYPES[entry["dtype"]], count, offset=entry["offset"])
    return raw.reshape(entry["shape"]).astype(np.float32, copy=False)


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file as numpy arrays. Raises InputError."""
    try:
        return dict(safetensors.numpy.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise verdict(
            error, InputError(f"{path} is not a readable safetensors file: {error}")
        ) from error


def describe(path: Path) -> dict[str, Any]:
    """The manifest's entry for one file."""
    digest, size = atomic.sha256_of(path)
    return {"sha256": digest, "size": size}

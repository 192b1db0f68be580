"""The bundle: an exported model, its manifest, and the keys that its devices trust. Imports numpy only.

    manifest.json         facts about the model (the fields of `Manifest`) and the digest of every other file
    model files           of the target: model.onnx, or model.pte and model.ptd
    weights               W_e of every adapted weight, `head.weight` and `head.bias`, raw, in one of these files or in
                          weights.safetensors: the manifest says where. Engine and device read this one copy.
    factors.safetensors   <k>.<projection>.A/.B of the tasks 1..e as shipped, and `canary.logits`
    classes.json          the class names in the order of the head's rows, for any program
    trust.json            public keys and threshold

The bundle id is the SHA-256 of manifest.json. docs/packet.md describes every field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..errors import InputError, NotForThisDevice
from ..shortage import verdict
from ..state import Merging, Projection, TaskState, extended, factors_from
from ..storage import atomic
from .canonical import UNIT, dump_json, parse_exact_json, parse_json, sha256, to_units
from .encoding import ENCODINGS, Factors
from .fields import (
    BYTES,
    ONE,
    digest,
    either,
    in_units,
    listed,
    mapped,
    one_of,
    record,
    text,
    whole,
)
from .limits import LIMITS
from .packet import magnitudes_from, name_problem
from .signing import Trust

FORMAT, CLASSES_FORMAT = "sdlora-edge/bundle/4", "sdlora-edge/classes/1"
MANIFEST, TRUST, FACTORS = "manifest.json", "trust.json", "factors.safetensors"
CLASSES = "classes.json"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
CANARY_LOGITS = "canary.logits"
INPUTS, CONSTANTS = "inputs", "constants"
"""how the model holds its adapted weights: inputs with defaults, or constants that need a new session for new values"""
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""dtypes of weights in a model's files; the arithmetic is float32, whatever the dtype in the file"""
MANIFEST_LIMIT = 64 * 1024 * 1024
"""bytes of manifest.json or classes.json"""
_LARGEST = in_units(LIMITS.magnitude)
_MAGNITUDE = whole(-_LARGEST, _LARGEST)

KINDS = {
    "states": listed(digest, 1, LIMITS.sequence + 1),
    "task_name": text(),
    "model": text(),
    "target": text(),
    "precision": text(),
    "tolerance": whole(1, ONE - 1),
    "min_agreement": whole(0, ONE),
    "weights_as": one_of(INPUTS, CONSTANTS),
    "capacity": whole(0, LIMITS.rows),
    "encoding": one_of(*ENCODINGS),
    "revisions": listed(whole(0, LIMITS.revision), 0, LIMITS.sequence),
    "magnitudes": listed(
        either(_MAGNITUDE, listed(_MAGNITUDE, 1, LIMITS.sequence)), 0, LIMITS.sequence
    ),
    "preprocessing": mapped(lambda value: None),  # `inputs` checks it: it belongs to the modality
    "projections": listed(Projection.from_dict, 0, LIMITS.sequence),
    "weights": mapped(
        record(
            {
                "file": text(),
                "offset": whole(0, BYTES),
                "dtype": one_of(*DTYPES),
                "shape": listed(whole(0, BYTES), 1, 2),
            }
        )
    ),
    "canary": record(
        {
            "seed": whole(0, LIMITS.seed),
            "count": whole(1, LIMITS.canary_inputs),
            "tolerance": whole(1, ONE - 1),
        }
    ),
    "made_with": mapped(either(whole(0, BYTES), text())),
    "files": mapped(record({"sha256": digest, "size": whole(0, BYTES)})),
}
"""What the manifest holds beside `format`: the kind and the bounds of each field. `_problems` adds the rules between fields."""


@dataclass(frozen=True)
class Canary:
    """The bundle's own canary. Its expected outputs are the tensor `canary.logits` of factors.safetensors.

    Args:
        seed: Makes the inputs (`inputs.canary.inputs`).
        count: Number of inputs.
        tolerance: Largest difference that a device may find, as `inputs.canary.largest_difference` measures it.
    """

    seed: int
    count: int
    tolerance: float


@dataclass(frozen=True)
class Manifest:
    """The facts about an exported model, as Python numbers; `to_json` writes fractions as integers.

    Args:
        states: State digests S_0 to S_e. S_0 is the lineage, S_e the bundle's own state, e its task.
        task_name: Name of task e.
        model: Name of the backbone.
        target: What runs the model: "onnx", "executorch", or the name of another package's engine.
        precision: Precision of the weights that are not adapted.
        tolerance: Largest logit difference to torch on images (`export.precision`).
        min_agreement: Smallest share of these images that must get the same class as with torch.
        weights_as: INPUTS or CONSTANTS.
        capacity: Number of head rows the model has room for; 0 for any number.
        encoding: Encoding of the factors.
        revisions: Of the tasks 1 to e.
        magnitudes: alpha_k(e) for k = 1..e, each a number, or a list with one number for each projection.
        preprocessing: JSON of `inputs.image.Preprocessing`.
        projections: The adapted slices of the weights.
        weights: {tensor: {"file", "offset", "dtype", "shape"}}: the tensor's place, raw, row by row, little endian. The
            head fills the first rows of its capacity.
        canary: The bundle's own canary.
        made_with: Versions of the libraries that made the model.
        files: {name: {"sha256", "size"}} of every other file.
    """

    states: tuple[str, ...]
    task_name: str
    model: str
    target: str
    precision: str
    tolerance: float
    min_agreement: float
    weights_as: str
    capacity: int
    encoding: str
    revisions: tuple[int, ...]
    magnitudes: tuple[Any, ...]
    preprocessing: Mapping[str, Any]
    projections: tuple[Projection, ...]
    weights: Mapping[str, Mapping[str, Any]]
    canary: Canary
    made_with: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def lineage(self) -> str:
        """S_0."""
        return self.states[0]

    @property
    def state(self) -> str:
        """S_e."""
        return self.states[-1]

    @property
    def task(self) -> int:
        """e."""
        return len(self.states) - 1

    @property
    def revision(self) -> int:
        """Revision of task e."""
        return self.revisions[-1] if self.revisions else 0

    def to_json(self) -> bytes:
        """Canonical JSON with integers only."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        value["tolerance"] = max(1, in_units(self.tolerance))
        value["min_agreement"] = in_units(self.min_agreement)
        value["magnitudes"] = to_units(np.array(self.magnitudes, np.float64))
        value["projections"] = [p.to_dict() for p in self.projections]
        value["canary"] = asdict(self.canary)
        value["canary"]["tolerance"] = max(1, in_units(self.canary.tolerance))
        return dump_json({"format": FORMAT, **value})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            InputError: It has another format version, or a field is missing, unknown, of the wrong kind or out of bounds.
        """
        value = parse_exact_json(data, MANIFEST)
        if (found := value.pop("format", None)) != FORMAT:
            raise InputError(
                f"bundle format {found!r} is not {FORMAT!r}: export the bundle again with this version"
            )
        try:
            record(KINDS)(value)
            for problem in _problems(value):
                raise ValueError(problem)
            tasks = len(value["states"]) - 1
            magnitudes = magnitudes_from(value["magnitudes"], tasks, len(value["projections"]))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{MANIFEST} is not a bundle's manifest: {error}") from error
        canary = {**value["canary"], "tolerance": value["canary"]["tolerance"] * UNIT}
        return cls(
            **{
                **value,
                "states": tuple(value["states"]),
                "tolerance": value["tolerance"] * UNIT,
                "min_agreement": value["min_agreement"] * UNIT,
                "revisions": tuple(value["revisions"]),
                "magnitudes": tuple(magnitudes.tolist()),
                "projections": tuple(Projection.from_dict(p) for p in value["projections"]),
                "canary": Canary(**canary),
            }
        )


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
        own = (TRUST, FACTORS, CLASSES)
        return sum(int(f["size"]) for name, f in self.manifest.files.items() if name not in own)

    def require_room(self, classes: int) -> None:
        """Raises NotForThisDevice if the model has no room for this number of head rows."""
        if 0 < self.manifest.capacity < classes:
            raise NotForThisDevice(
                f"{classes} classes exceed this bundle's capacity of {self.manifest.capacity}: "
                f"export a bundle with --max-classes {classes} or more"
            )


def open_bundle(path: Path) -> Bundle:
    """Read a bundle after every file has been compared with the manifest.

    Raises:
        InputError: A file is missing, damaged or contradicts the manifest; the message names it.
    """
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
    trust = Trust.from_dict(parse_json(atomic.read(path / TRUST), TRUST))
    classes = read_classes(atomic.read(path / CLASSES, MANIFEST_LIMIT))
    stored = load_tensors(path / FACTORS)
    try:
        weights = {name: _load_raw(path, entry) for name, entry in manifest.weights.items()}
        state = _state(manifest, classes, weights)
        names = [p.name for p in manifest.projections]
        factors = tuple(
            factors_from(stored, names, f"{k}.", manifest.encoding)
            for k in range(1, manifest.task + 1)
        )
        logits = _canary_logits(stored, manifest, classes)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: manifest and files contradict each other: {error}") from error
    return Bundle(path, sha256(data), manifest, trust, weights, state, factors, logits)


def classes_json(classes: Sequence[str | None]) -> bytes:
    """classes.json: the name of each head row, None for a retired one."""
    return dump_json({"format": CLASSES_FORMAT, "classes": list(classes)})


def read_classes(data: bytes) -> tuple[str | None, ...]:
    """The class of each head row, in order; None for a retired one. Raises InputError."""
    value = parse_json(data, CLASSES)
    if (found := value.get("format")) != CLASSES_FORMAT:
        raise InputError(f"{CLASSES} has format {found!r}, not {CLASSES_FORMAT!r}: export it again")
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


def _problems(value: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the fields of a manifest's JSON; each field has been checked against KINDS."""
    task, capacity, files = len(value["states"]) - 1, value["capacity"], value["files"]
    if len(value["revisions"]) != task or sorted(value["revisions"]) != value["revisions"]:
        yield f"revisions {value['revisions']} for {task} tasks, or revisions that fall"
    if value["weights_as"] == CONSTANTS and not capacity:
        yield "weights that are constants need a capacity"
    rows = value["weights"][HEAD_WEIGHT]["shape"][0]
    if capacity not in (0, rows):
        yield f"a capacity of {capacity} for a head of {rows} rows"
    for name in files:
        if Path(name).name != name:
            yield f"{name!r} lies outside the bundle"
    used = {weight["file"] for weight in value["weights"].values()}
    if missing := {TRUST, FACTORS, CLASSES, *used} - set(files):
        yield f"files does not list {', '.join(sorted(missing))}"
    for name, weight in value["weights"].items():
        # dtype=object: the product of a hostile shape must not wrap around
        count = int(np.prod(weight["shape"], dtype=object))
        end = weight["offset"] + count * DTYPES[weight["dtype"]].itemsize
        if weight["file"] in files and end > files[weight["file"]]["size"]:
            yield f"weight {name!r} ends behind the end of {weight['file']}"


def _state(
    manifest: Manifest, classes: tuple[str | None, ...], weights: dict[str, np.ndarray]
) -> TaskState:
    """The state of task e. Takes the head out of `weights`. Raises KeyError, ValueError if shapes do not fit."""
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
        tuple(before),
    )


def _canary_logits(
    stored: Mapping[str, np.ndarray], manifest: Manifest, classes: Sequence[str | None]
) -> np.ndarray:
    """float32 (count, live classes). Raises KeyError, ValueError."""
    logits = stored[CANARY_LOGITS]
    live = sum(name is not None for name in classes)
    if logits.dtype != np.float32 or logits.shape != (manifest.canary.count, live):
        raise ValueError(f"{CANARY_LOGITS} {logits.dtype} {logits.shape} for {live} classes")
    if not np.isfinite(logits).all():
        raise ValueError(f"{CANARY_LOGITS} holds a number that is not finite")
    return logits


def _load_raw(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """A weight from its place in a file, as float32. Raises ValueError if the file ends before it."""
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

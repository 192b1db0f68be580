"""manifest.json: the facts about an exported model. Each field is declared with kind and bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..state import Projection
from .canonical import UNIT, dump_json, parse_exact_json, to_units
from .encoding import ENCODINGS
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
from .head_update import HEAD_PREFIX
from .limits import LIMITS
from .packet import magnitudes_from

FORMAT = "sdlora-edge/bundle/4"
MANIFEST, TRUST, FACTORS = "manifest.json", "trust.json", "factors.safetensors"
CLASSES = "classes.json"
FLEET_ROOT = "fleet-root.json"
"""The root of trust of the fleet repository that devices follow, if the bundle has one."""
FLEET_ROOT_LIMIT = 512 * 1024
"""bytes of it"""
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
INPUTS, CONSTANTS, PLAIN_INPUTS = "inputs", "constants", "plain-inputs"
"""how the model holds its adapted weights: inputs with defaults, constants that need a new session
for new values, or inputs without defaults (ONNX Runtime for JavaScript feeds no others)"""
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
"""dtypes of weights in a model's files; the arithmetic is float32, whatever the dtype in the
file"""
MANIFEST_LIMIT = 64 * 1024 * 1024
"""bytes of manifest.json or classes.json"""
_LARGEST = in_units(LIMITS.magnitude)
_MAGNITUDE = whole(-_LARGEST, _LARGEST)
_PLACE = record(
    {
        "name": text(),
        "tensor": text(),
        "rows": listed(whole(0, BYTES), 2, 2),
        "shape": listed(whole(1, BYTES), 2, 2),
    }
)


def _projection(value: Any) -> None:
    _PLACE(value)
    Projection.from_dict(value)


KINDS = {
    "states": listed(digest, 1, LIMITS.sequence + 1),
    "task_name": text(),
    "model": text(),
    "features": text(),
    "target": text(),
    "precision": text(),
    "tolerance": whole(1, ONE - 1),
    "min_agreement": whole(0, ONE),
    "weights_as": one_of(INPUTS, CONSTANTS, PLAIN_INPUTS),
    "capacity": whole(0, LIMITS.rows),
    "encoding": one_of(*ENCODINGS),
    "revisions": listed(whole(0, LIMITS.revision), 0, LIMITS.sequence),
    "magnitudes": listed(
        either(_MAGNITUDE, listed(_MAGNITUDE, 1, LIMITS.sequence)), 0, LIMITS.sequence
    ),
    "preprocessing": mapped(lambda value: None),  # `inputs` checks it: it belongs to the modality
    "projections": listed(_projection, 0, LIMITS.sequence),
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
"""What the manifest holds beside `format`: the kind and the bounds of each field. `_problems` adds
the rules between fields."""


@dataclass(frozen=True)
class Canary:
    """The bundle's own canary.

    Its expected outputs are the tensor `canary.logits` of factors.safetensors.

    Args:
        seed: Makes the inputs (`inputs.canary.inputs`).
        count: Number of inputs.
        tolerance: Largest difference that a device may find, as `inputs.canary.largest_difference`
            measures it.
    """

    seed: int
    count: int
    tolerance: float


@dataclass(frozen=True)
class Manifest:
    """The facts about an exported model, as Python numbers; `to_json` writes fractions as integers.

    Args:
        states: State digests S_0 to S_e. S_0 is the lineage, S_e the bundle's own state, e its
            task.
        task_name: Name of task e.
        model: Name of the backbone.
        features: What of the backbone the head sees.
        target: What runs the model: "onnx", "executorch", or the name of another package's engine.
        precision: Precision of the weights that are not adapted.
        tolerance: Largest logit difference to torch on images (`export.precision`).
        min_agreement: Smallest share of these images that must get the same class as with torch.
        weights_as: INPUTS, CONSTANTS or PLAIN_INPUTS.
        capacity: Number of head rows the model has room for; 0 for any number.
        encoding: Encoding of the factors.
        revisions: Of the tasks 1 to e.
        magnitudes: alpha_k(e) for k = 1..e, each a number, or a list with one number for each
            projection.
        preprocessing: JSON of `inputs.image.Preprocessing`.
        projections: The adapted slices of the weights.
        weights: {tensor: {"file", "offset", "dtype", "shape"}}: the tensor's place, raw, row by
            row, little endian. The head fills the first rows of its capacity.
        canary: The bundle's own canary.
        made_with: Versions of the libraries that made the model.
        files: {name: {"sha256", "size"}} of every other file.
    """

    states: tuple[str, ...]
    task_name: str
    model: str
    features: str
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
            InputError: It has another format version, or a field is missing, unknown, of the wrong
                kind or out of bounds.
        """
        value = parse_exact_json(data, MANIFEST)
        if (found := value.pop("format", None)) != FORMAT:
            raise InputError(
                f"bundle format {found!r} is not {FORMAT!r}: "
                "export the bundle again with this version"
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


def _problems(value: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between the fields of a manifest's JSON. Each field alone fits KINDS."""
    task, capacity, files = len(value["states"]) - 1, value["capacity"], value["files"]
    if len(value["revisions"]) != task or sorted(value["revisions"]) != value["revisions"]:
        yield f"revisions {value['revisions']} for {task} tasks, or revisions that fall"
    if len(set(value["states"])) != task + 1:
        yield "a state is named twice"
    yield from _wrong_names([p["name"] for p in value["projections"]])
    if value["weights"][HEAD_BIAS]["dtype"] != "float32":
        yield f"{HEAD_BIAS} must be float32: -1e30 is infinite in float16"
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


def _wrong_names(projections: Sequence[str]) -> Iterator[str]:
    if len(set(projections)) != len(projections):
        yield "two projections have one name"
    if head := [name for name in projections if name.startswith(HEAD_PREFIX)]:
        yield f"projection {head[0]!r} has a name that only tensors of the head may have"

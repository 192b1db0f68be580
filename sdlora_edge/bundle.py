"""What a device is flashed with: an exported model, its manifest, and the keys it obeys. numpy only.

    manifest.json         everything a device must know (the fields of `Manifest`), with the digest of every other file
    model.onnx            the graph; its adapted weights and head are overridable initializers, kept in
    weights.safetensors   W_e of every adapted weight, `head.weight`, `head.bias`: one copy, read by the engine and by us
    factors.safetensors   <k>.<projection>.A/.B of the tasks up to e, as shipped
    trust.json            public keys and threshold

The bundle id is the SHA-256 of manifest.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from . import files
from .canonical import dump_json, is_sha256, parse_json, sha256
from .errors import InputError
from .packet import magnitudes_from, name_problem
from .signing import Trust
from .state import Factors, Projection, TaskState, factors_from

FORMAT = "sdlora-edge/bundle/1"
MANIFEST, TRUST, WEIGHTS, FACTORS = "manifest.json", "trust.json", "weights.safetensors", "factors.safetensors"
MODELS = {"onnx": ("model.onnx",)}
"""the model files of each target"""
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
MANIFEST_LIMIT = 64 * 1024 * 1024
"""bytes"""


@dataclass(frozen=True)
class Manifest:
    """The facts about an exported model. `state` is S_e, `task` is e, `magnitudes` alpha_k(e) for k = 1..e, each a number or,
    where projections have their own, a list of one for each.

    preprocessing: the fields of `device.preprocessing.Preprocessing`.
    canary: {"seed": int, "logits": [[float]]}, what the host got for the canary inputs. tolerance: the largest logit
    difference this precision may show. files: {name: {"sha256", "size"}}.
    """

    lineage: str
    state: str
    task: int
    task_name: str
    model: str
    target: str
    precision: str
    tolerance: float
    encoding: str
    classes: tuple[str, ...]
    magnitudes: tuple[Any, ...]
    preprocessing: Mapping[str, Any]
    projections: tuple[Projection, ...]
    canary: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> bytes:
        value = {name: getattr(self, name) for name in self.__dataclass_fields__}
        value["projections"] = [p.to_dict() for p in self.projections]
        return dump_json({"format": FORMAT, **value})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises InputError for another format version or a field that is missing or of the wrong kind."""
        value = parse_json(data, MANIFEST)
        if (found := value.pop("format", None)) != FORMAT:
            raise InputError(f"bundle format {found!r} is not {FORMAT!r}: export it again with this version")
        try:
            manifest = cls(**value)
            _check_types(manifest)
            if any(name_problem(name) for name in manifest.classes) or len(set(manifest.classes)) != len(manifest.classes):
                raise ValueError("a class name is empty, malformed or stands twice")
            magnitudes = magnitudes_from(manifest.magnitudes, manifest.task, len(manifest.projections))
            if not 0 < manifest.tolerance < 1:
                raise ValueError(f"tolerance {manifest.tolerance}")
            return replace(
                manifest,
                classes=tuple(manifest.classes),
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

    @property
    def model_bytes(self) -> int:
        """What shipping the whole model instead would cost: graph and weights."""
        return sum(int(f["size"]) for name, f in self.manifest.files.items() if name not in (TRUST, FACTORS))


def open_bundle(path: Path) -> Bundle:
    """Read a bundle, comparing every file with the manifest first. Raises InputError naming the file that is wrong."""
    if not path.is_dir():
        raise InputError(f"{path} is not a bundle: no such folder; make one with sdlora-edge export")
    data = files.read(path / MANIFEST, MANIFEST_LIMIT)
    manifest = Manifest.from_json(data)
    for name, entry in manifest.files.items():
        if Path(name).name != name:
            raise InputError(f"{path / MANIFEST} names a file outside the bundle: {name!r}")
        if files.sha256_of(path / name) != (entry["sha256"], entry["size"]):
            raise InputError(f"{path / name} is not the file the manifest names: get the bundle again")
    if missing := {TRUST, WEIGHTS, FACTORS, *MODELS.get(manifest.target, ())} - set(manifest.files):
        raise InputError(f"{path / MANIFEST} does not list {', '.join(sorted(missing))}")
    trust = Trust.from_dict(parse_json(files.read(path / TRUST), TRUST))
    weights = load_tensors(path / WEIGHTS)
    stored = load_tensors(path / FACTORS)
    try:
        head_weight, head_bias = weights.pop(HEAD_WEIGHT), weights.pop(HEAD_BIAS)
        for p in manifest.projections:
            if weights[p.tensor].shape[1:] != (p.columns,) or p.stop > len(weights[p.tensor]):
                raise ValueError(f"projection {p.name} does not fit {p.tensor} {weights[p.tensor].shape}")
        if len(head_weight) != len(manifest.classes) or head_bias.shape != (len(manifest.classes),):
            raise ValueError(f"head {head_weight.shape} for {len(manifest.classes)} classes")
        names = [p.name for p in manifest.projections]
        factors = tuple(factors_from(stored, names, f"{k}.") for k in range(1, manifest.task + 1))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: manifest and weights do not fit each other: {error!r}") from error
    magnitudes = np.array(manifest.magnitudes, np.float64)
    state = TaskState(manifest.task, manifest.task_name, manifest.state, manifest.classes, magnitudes, head_weight, head_bias, {})
    return Bundle(path, sha256(data), manifest, trust, weights, state, factors)


def _check_types(manifest: Manifest) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError unless every field is of its kind."""
    for name in ("task_name", "model", "target", "precision", "encoding"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is not a text")
    if not (is_sha256(manifest.lineage) and is_sha256(manifest.state)):
        raise ValueError("lineage or state is no SHA-256")
    if type(manifest.task) is not int or manifest.task < 0:
        raise ValueError(f"task {manifest.task!r}")
    for name, entry in manifest.files.items():
        if not is_sha256(entry["sha256"]) or type(entry["size"]) is not int or "\0" in name:
            raise ValueError(f"file {name!r} has no digest and size")
    logits = np.array(manifest.canary["logits"], np.float32)
    if type(manifest.canary["seed"]) is not int or logits.ndim != 2 or logits.shape[1] != len(manifest.classes):
        raise ValueError("the canary has no seed, or no logits for each class")


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file as numpy arrays. Raises InputError."""
    try:
        return dict(safetensors.numpy.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def describe(path: Path) -> dict[str, Any]:
    """The manifest's entry for one file."""
    digest, size = files.sha256_of(path)
    return {"sha256": digest, "size": size}

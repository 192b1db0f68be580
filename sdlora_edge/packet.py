"""One task's update in one signed file. This module is the packet format: `build` writes it, `read` is the only reader.

    bytes 0..7     length of the header, unsigned, little endian                            } a safetensors file, so
    header         canonical JSON, padded with spaces to a multiple of 8:                   } any tool opens it
                   {"__metadata__": {"envelope": DSSE envelope of the manifest, "format": FORMAT}, tensor table}
    data           the tensors, widest dtype first, then by name, without gaps

    manifest       {"format", "lineage", "sequence": t, "from": S_{t-1}, "to": S_t, "task": {"name", "classes"},
                    "encoding", "deltas": [alpha_k(t) - alpha_k(t-1), k = 1..t], each a number, or a list of one for each
                    projection; "canary": {"seed", "count"},
                    "content": sha256(canonical JSON of the tensor table, data)}
    tensors        <projection>.A, <projection>.B   float16   (rank, columns), (rows, rank); none for an absorbed task
                   head.index                       int32     (n,)            rows that are new or changed
                   head.weight, head.bias           float16, float32          (n, features), (n,)
                   canary.logits                    float32   (count, classes)

Reading goes from the outside in: sizes, header, signatures, content digest, manifest, and only then tensors; where the
packet stands against a device (lineage, order, shapes, finiteness) is `Packet.check`. numpy only.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import signing
from .canonical import dump_json, is_sha256, parse_json, sha256
from .errors import InputError, LimitError, NotForThisDevice, NothingToDo, TrustError
from .state import Projection, TaskState, TaskUpdate, advance, factors_from

FORMAT = "sdlora-edge/packet/1"
SUFFIX = ".sdlora"
ENCODING = "fp16"
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "F16": np.dtype("<f2")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Limits:
    """What a reader is willing to look at, in bytes unless said otherwise."""

    packet: int = 64 * 1024 * 1024
    header: int = 1024 * 1024
    name: int = 200
    """characters in a task or class name"""
    canary_inputs: int = 16
    """pictures"""
    magnitude: float = 1e4
    """absolute value of a magnitude, and of a factor's or head's entry"""


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Packet:
    """A packet whose signatures and content have been verified."""

    manifest: Mapping[str, Any]
    update: TaskUpdate
    canary_seed: int
    canary_logits: np.ndarray
    digest: str
    """SHA-256 of the file"""

    @property
    def sequence(self) -> int:
        return self.update.task

    def check(self, state: TaskState, lineage: str, projections: Sequence[Projection]) -> None:
        """May this packet follow `state`? Raises NotForThisDevice, NothingToDo, TrustError (replay) or InputError."""
        if self.manifest["lineage"] != lineage:
            raise NotForThisDevice(
                f"packet {self.sequence} belongs to another lineage ({self.manifest['lineage'][:12]}, this bundle is "
                f"{lineage[:12]}): build packets from the run that this bundle was exported from"
            )
        if self.manifest["to"] == state.digest:
            raise NothingToDo(f"packet {self.sequence} is applied already")
        if self.sequence <= state.task:
            raise TrustError(f"packet {self.sequence} is a replay: this device is at task {state.task} already")
        if self.sequence > state.task + 1:
            missing = " and ".join(sorted({str(state.task + 1), str(self.sequence - 1)}, key=int))
            raise NotForThisDevice(
                f"packet {self.sequence} is out of order: this device is at task {state.task}; apply {missing} first"
            )
        if self.manifest["from"] != state.digest:
            raise NotForThisDevice(
                f"packet {self.sequence} follows another state ({self.manifest['from'][:12]}) than this device is in "
                f"({state.digest[:12]}): the run was trained again after these packets were built"
            )
        _check_shapes(self, state, {p.name: p for p in projections})
        if advance(state, self.update).digest != self.manifest["to"]:
            raise InputError(f"packet {self.sequence} does not lead to the state it names: build it again")


def encode(factor: np.ndarray) -> np.ndarray:
    """A factor as it is shipped: float16, rounded to nearest. Raises ValueError where it does not fit."""
    shipped = factor.astype(np.float16)
    if not np.isfinite(shipped).all():
        raise ValueError("a factor does not fit float16")
    return shipped


def build(
    update: TaskUpdate,
    before: TaskState,
    lineage: str,
    canary_seed: int,
    canary_logits: np.ndarray,
    sign: Callable[[bytes], bytes],
) -> bytes:
    """The bytes of a packet. `sign` puts a payload into a DSSE envelope (`signing.sign`)."""
    tensors = update.tensors() | {"canary.logits": canary_logits.astype(np.float32)}
    table, data = _table(tensors)
    manifest = {
        "format": FORMAT,
        "lineage": lineage,
        "sequence": update.task,
        "from": before.digest,
        "to": advance(before, update).digest,
        "task": {"name": update.name, "classes": list(update.classes)},
        "encoding": ENCODING,
        "deltas": update.deltas.tolist(),
        "canary": {"seed": canary_seed, "count": len(canary_logits)},
        "content": sha256(dump_json(table), data),
    }
    envelope = sign(dump_json(manifest)).decode("ascii")
    return _header(envelope, table) + data


def read(data: bytes, trust: signing.Trust, limits: Limits = LIMITS) -> Packet:
    """Verify a packet and read it.

    Raises InputError (not a whole packet, or not one of ours), LimitError (too large), TrustError (signatures).
    """
    envelope, table, content = _open(data, limits)
    payload = signing.verify(envelope.encode("ascii"), trust)
    manifest = parse_json(payload, "the manifest")
    if manifest.get("format") != FORMAT:
        raise InputError(f"packet format {manifest.get('format')!r} is not {FORMAT!r}: update this program")
    if manifest.get("content") != sha256(dump_json(table), content):
        raise InputError("the packet's content is damaged: its digest is not the one that was signed; get it again")
    try:
        return _parse(manifest, _tensors(table, content), sha256(data), limits)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the packet's manifest does not describe its tensors: {error!r}") from error


def unverified_manifest(data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """What the manifest claims, for showing to a person: NOTHING of it is proved. Raises InputError."""
    envelope, table, content = _open(data, limits)
    manifest = parse_json(signing.unverified_payload(envelope.encode("ascii")), "the manifest")
    try:
        tensors = {name: [str(t.dtype), list(t.shape)] for name, t in _tensors(table, content).items()}
        named = {"name": str(manifest["task"]["name"]), "classes": [str(c) for c in manifest["task"]["classes"]]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the packet does not describe itself: {error!r}") from error
    return manifest | {"task": named, "tensors": tensors}


def name_problem(name: str, limits: Limits = LIMITS) -> str | None:
    """Why `name` may not be a class or task name: None where it may."""
    if not isinstance(name, str) or not name.strip():
        return "is empty"
    if len(name) > limits.name:
        return f"is longer than {limits.name} characters"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's NFC form"
    if any(unicodedata.category(c).startswith("C") for c in name):
        return "holds a control character"
    if "/" in name or "\\" in name:
        return "holds a path separator"
    return None


def _table(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    table: dict[str, Any] = {}
    chunks, end = [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        array = tensors[name]
        dtype = array.dtype.newbyteorder("<")
        chunk = np.ascontiguousarray(array, dtype).tobytes()
        table[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    return table, b"".join(chunks)


def _header(envelope: str, table: Mapping[str, Any]) -> bytes:
    text = dump_json({"__metadata__": {"envelope": envelope, "format": FORMAT}, **table})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _open(data: bytes, limits: Limits) -> tuple[str, dict[str, Any], bytes]:
    """(envelope, tensor table, data) of a file in the one canonical form; nothing is believed yet."""
    if len(data) > limits.packet:
        raise LimitError(f"the packet has {len(data)} bytes, more than the {limits.packet} allowed")
    if len(data) < 8:
        raise InputError("not a packet: shorter than its first field; the download was cut short")
    (length,) = struct.unpack("<Q", data[:8])
    if length > limits.header:
        raise LimitError(f"the packet's header claims {length} bytes, more than the {limits.header} allowed")
    if len(data) < 8 + length:
        raise InputError("the packet ends within its header; the download was cut short")
    table = parse_json(data[8 : 8 + length], "the packet's header")
    metadata = table.pop("__metadata__", None)
    envelope = metadata.get("envelope") if isinstance(metadata, dict) else None
    if not isinstance(envelope, str) or not envelope.isascii():
        raise InputError("not a packet: its header carries no envelope")
    try:
        canonical = _header(envelope, table)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the packet's header is malformed: {error}") from error
    if canonical != data[: 8 + length]:
        raise InputError("the packet's header is not in canonical form: it was changed after it was built")
    return envelope, table, data[8 + length :]


def _tensors(table: Mapping[str, Any], data: bytes) -> dict[str, np.ndarray]:
    """Read-only views of the verified data. Raises ValueError or TypeError unless the table tiles it exactly."""
    tensors: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(_natural(n) for n in entry["shape"])
        if len(shape) > 2:
            raise ValueError(f"{name} has {len(shape)} dimensions")
        if start != end or stop - start != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{name}: offsets {start}..{stop} do not fit shape {shape}")
        tensors[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes belong to no tensor")
    return tensors


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def magnitudes_from(value: Sequence[Any], tasks: int, projections: int, limits: Limits = LIMITS) -> np.ndarray:
    """Magnitudes or their deltas, float64 (tasks,) or (tasks, projections). Raises ValueError, TypeError for anything else."""
    shared = not any(isinstance(row, (list, tuple)) for row in value)
    found = np.array([_number(x) if shared else [_number(y) for y in x] for x in value], np.float64)
    if found.shape not in ((tasks,), (tasks, projections)) or not (np.abs(found) <= limits.magnitude).all():
        raise ValueError(f"magnitudes of shape {found.shape} for task {tasks} and {projections} projections, or one out of bounds")
    return found


def _parse(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray], digest: str, limits: Limits) -> Packet:
    sequence, encoding, task = _natural(manifest["sequence"]), manifest["encoding"], manifest["task"]
    if encoding != ENCODING:
        raise ValueError(f"encoding {encoding!r} is unknown")
    for field in ("lineage", "from", "to"):
        if not is_sha256(manifest[field]):
            raise ValueError(f"{field} is no SHA-256")
    names = [task["name"], *task["classes"]]
    for name in names:
        if problem := name_problem(name, limits):
            raise ValueError(f"name {name!r} {problem}")
    rows = manifest["deltas"]
    deltas = magnitudes_from(rows, sequence, len(rows[0]) if rows and isinstance(rows[0], list) else 0, limits)
    if sequence < 1:
        raise ValueError(f"sequence {sequence}")
    logits = tensors["canary.logits"]
    if not (logits.ndim == 2 and 1 <= len(logits) <= limits.canary_inputs and np.isfinite(logits).all()):
        raise ValueError(f"canary of shape {logits.shape}")
    if tensors["head.index"].ndim != 1:
        raise ValueError("head.index is not a list of rows")
    names_of_factors = {name[:-2] for name in tensors if name.endswith((".A", ".B"))}
    known = {"head.index", "head.weight", "head.bias", "canary.logits"}
    known |= {f"{name}.{part}" for name in names_of_factors for part in "AB"}
    if known != set(tensors):
        raise ValueError(f"unexpected or missing tensors: {sorted(known ^ set(tensors))[:4]}")
    update = TaskUpdate(
        sequence,
        task["name"],
        tuple(task["classes"]),
        deltas,
        tensors["head.index"],
        tensors["head.weight"],
        tensors["head.bias"],
        factors_from(tensors, sorted(names_of_factors)),
    )
    return Packet(manifest, update, _natural(manifest["canary"]["seed"]), logits, digest)


def _check_shapes(packet: Packet, state: TaskState, projections: Mapping[str, Projection]) -> None:
    update, bound = packet.update, LIMITS.magnitude
    total = len(state.classes) + len(update.classes)
    if len(set(state.classes + update.classes)) != total:
        raise InputError(f"packet {update.task} names a class twice, or one that is known already")
    n, features = len(update.head_index), state.head_weight.shape[1]
    magnitudes = (len(projections),) if update.deltas.ndim == 2 else ()
    if update.deltas.shape[1:] != magnitudes or (state.task and state.magnitudes.ndim != update.deltas.ndim):
        raise InputError(f"packet {update.task}: magnitude deltas of shape {update.deltas.shape} do not follow this state's")
    expected = [
        ("head.index", update.head_index, np.int32, (n,)),
        ("head.weight", update.head_weight, np.float16, (n, features)),
        ("head.bias", update.head_bias, np.float32, (n,)),
        ("canary.logits", packet.canary_logits, np.float32, (len(packet.canary_logits), total)),
    ]
    for name, factors in update.factors.items():
        if (p := projections.get(name)) is None:
            raise InputError(f"packet {update.task} adapts {name!r}, which this bundle does not have")
        rank = factors.A.shape[0] if factors.A.ndim == 2 else -1
        expected.append((f"{name}.A", factors.A, np.float16, (rank, p.columns)))
        expected.append((f"{name}.B", factors.B, np.float16, (p.stop - p.start, rank)))
    for name, array, dtype, shape in expected:
        if array.dtype != dtype or array.shape != shape:
            raise InputError(f"packet {update.task}: {name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}{shape}")
        if name != "head.index" and not (np.abs(array.astype(np.float32)) <= bound).all():
            raise InputError(f"packet {update.task}: {name} holds NaN, infinity or a value beyond {bound:g}")
    index = update.head_index.astype(np.int64)
    if (np.diff(index) <= 0).any() or (index < 0).any() or (index >= total).any():
        raise InputError(f"packet {update.task}: head.index is not ascending within {total} classes")
    if not set(range(len(state.classes), total)) <= set(index.tolist()):
        raise InputError(f"packet {update.task}: a new class comes without its head row")

"""The packet that teaches: the update of one task, or of several tasks in a row (a squash).

    manifest   {"format", "kind": "update", "lineage", "sequence": t, "from": S_a, "to": S_t,
                "encoding", "tasks": [task a+1, ..., task t],
                "canary": {"seed", "count"}, "content"}
    a task     {"name", "classes": [new names], "retired": [rows], "renamed": [[row, new name]],
                "revision", "deltas": [alpha_k(i) - alpha_k(i-1), k = 1..i]}; a delta is an
                integer in units of 2^-24, or a list of one for each projection
    tensors    for each task i, with "<i>." before the name:
               <projection>.A, .B (.A.scale, .B.scale)  as `encoding` says; none if the task does
                                                        not adapt the projection
               head.*                                   the group of `head_update.HeadUpdate`
               and canary.logits, float32 (count, live classes), after the last task

`container` is the file around them. `control` has the packets of other kinds. Whether a packet may
follow the state of a device is decided in `acceptance` and `lead`. numpy only.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, NotForThisDevice
from ..state import TaskUpdate, factors_from, next_digest
from . import encoding as encodings
from . import signing
from .canonical import UNIT, is_sha256, parse_exact_json, to_units
from .container import FORMAT, SUFFIX, Sealed, Sign, opened, seal, tensors, unseal
from .encoding import ENCODINGS
from .head_update import HEAD, HEAD_PREFIX, HeadUpdate
from .limits import LIMITS, Limits, natural

__all__ = [
    "FORMAT",
    "LIMITS",
    "SUFFIX",
    "Contents",
    "Limits",
    "Packet",
    "build",
    "read",
    "unverified_manifest",
]
KIND = "update"
CANARY = "canary.logits"
_CONTROLS = ("Cc", "Cf", "Cs", "Co")
"""Categories of Unicode. Not Cn: what a program finds unassigned depends on its version of Unicode,
and a host and its devices must agree."""
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
"""What Python raises while it reads what is missing or of another kind."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """What a packet brings.

    Attributes:
        lineage: S_0 of the run.
        begin: The digest of the state before the packet.
        updates: Of each task, in order.
        canary_seed: Of the inputs.
        canary_logits: float32 (count, live classes), what the host computed after the last task.
        encoding: Of the factors.
        revisions: Of each task. Empty means 0 for all.
    """

    lineage: str
    begin: str
    updates: tuple[TaskUpdate, ...]
    canary_seed: int
    canary_logits: np.ndarray
    encoding: str = encodings.DEFAULT
    revisions: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The number of the first task it brings."""
        return self.updates[0].task

    @property
    def sequence(self) -> int:
        """The number of the last task it brings."""
        return self.updates[-1].task


@dataclass(frozen=True, eq=False, kw_only=True)
class Packet(Contents):
    """A packet whose signatures and content have been verified.

    Attributes:
        end: The digest of the state after the packet, as the manifest claims it.
        digest: SHA-256 of the file.
    """

    end: str
    digest: str

    @property
    def update(self) -> TaskUpdate:
        """Of the last task."""
        return self.updates[-1]

    @property
    def revision(self) -> int:
        """Of the last task."""
        return self.revisions[-1]

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(task, revision) of each task."""
        return list(enumerate(self.revisions, self.first))


def build(contents: Contents, sign: Sign) -> bytes:
    """Write a packet.

    Raises:
        LimitError: The packet is larger than any device would read.
    """
    end = contents.begin
    for update in contents.updates:
        end = next_digest(end, update.digest())
    revisions = contents.revisions or (0,) * len(contents.updates)
    manifest = {
        "kind": KIND,
        "lineage": contents.lineage,
        "sequence": contents.sequence,
        "from": contents.begin,
        "to": end,
        "encoding": contents.encoding,
        "tasks": [
            {
                "name": u.name,
                "classes": list(u.classes),
                "retired": list(u.retired),
                "renamed": [list(pair) for pair in u.renamed],
                "revision": revision,
                "deltas": to_units(u.deltas),
            }
            for u, revision in zip(contents.updates, revisions, strict=True)
        ],
        "canary": {"seed": contents.canary_seed, "count": len(contents.canary_logits)},
    }
    arrays = {
        f"{u.task}.{name}": array for u in contents.updates for name, array in u.tensors().items()
    }
    return seal(manifest, arrays | {CANARY: contents.canary_logits.astype(np.float32)}, sign)


def squash(packets: Sequence[Packet], sign: Sign) -> bytes:
    """Make one packet of several, in order, with the last one's canary.

    A device ends in the same state, to the bit.

    Raises:
        NotForThisDevice: A packet does not follow from the one before it.
        LimitError: The packet is larger than any device would read.
    """
    for one, two in itertools.pairwise(packets):
        if one.lineage != two.lineage:
            raise NotForThisDevice(
                f"packets {one.sequence} and {two.sequence} belong to different lineages: "
                "squash packets of one run"
            )
        if one.end != two.begin:
            raise NotForThisDevice(
                f"packet {two.sequence} does not follow from packet {one.sequence}: pass every "
                "packet between them, once"
            )
    contents = Contents(
        lineage=packets[0].lineage,
        begin=packets[0].begin,
        updates=tuple(update for one in packets for update in one.updates),
        canary_seed=packets[-1].canary_seed,
        canary_logits=packets[-1].canary_logits,
        encoding=packets[0].encoding,
        revisions=tuple(revision for one in packets for revision in one.revisions),
    )
    return build(contents, sign)


def read(data: bytes, trust: signing.Trust, limits: Limits = LIMITS) -> Packet:
    """Verify a packet and read it.

    Raises:
        InputError: The file is damaged, is not a packet of this format, or brings no task.
        LimitError: The file is too large.
        TrustError: Signatures are missing.
    """
    return parse(unseal(data, trust, limits), limits)


def parse(sealed: Sealed, limits: Limits = LIMITS) -> Packet:
    """Read a verified file of this kind. Raises InputError."""
    if sealed.manifest.get("kind") != KIND:
        raise InputError(f"a packet of kind {sealed.manifest.get('kind')!r} brings no task")
    try:
        return _parse(sealed, limits)
    except _MALFORMED as error:
        raise InputError(
            f"the packet's manifest does not describe its tensors: {error!r}"
        ) from error


def _parse(sealed: Sealed, limits: Limits) -> Packet:
    manifest, arrays = sealed.manifest, sealed.tensors()
    sequence, tasks = natural(manifest["sequence"], limits.sequence), manifest["tasks"]
    encoding = manifest["encoding"]
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding {encoding!r} is unknown")
    for field in ("lineage", "from", "to"):
        if not is_sha256(manifest[field]):
            raise ValueError(f"{field} is not a SHA-256")
    if not (isinstance(tasks, list) and 1 <= len(tasks) <= min(sequence, limits.tasks)):
        raise ValueError(f"tasks are not a list of 1 to {min(sequence, limits.tasks)}")
    revisions = tuple(natural(task["revision"], limits.revision) for task in tasks)
    if list(revisions) != sorted(revisions):
        raise ValueError("a later task has a lower revision")
    logits = _canary(manifest["canary"], arrays.pop(CANARY), limits)
    numbered = enumerate(tasks, sequence - len(tasks) + 1)
    updates = tuple(_task(n, task, _own(arrays, n), encoding, limits) for n, task in numbered)
    if arrays:
        raise ValueError(f"unexpected tensors: {sorted(arrays)[:4]}")
    return Packet(
        lineage=manifest["lineage"],
        begin=manifest["from"],
        end=manifest["to"],
        updates=updates,
        canary_seed=natural(manifest["canary"]["seed"], limits.seed),
        canary_logits=logits,
        encoding=encoding,
        revisions=revisions,
        digest=sealed.digest,
    )


def _canary(entry: Mapping[str, Any], logits: np.ndarray, limits: Limits) -> np.ndarray:
    count = natural(entry["count"], limits.canary_inputs)
    if logits.dtype != np.float32 or logits.ndim != 2 or not 1 <= len(logits) == count:
        raise ValueError(f"{CANARY} is {logits.dtype}{logits.shape} for {count} images")
    if not (np.abs(logits) <= limits.logit).all():
        raise ValueError(f"{CANARY} holds NaN, infinity or a logit above {limits.logit}")
    return logits


def _own(arrays: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Take the tensors of one task out of `arrays`."""
    prefix = f"{number}."
    names = [name for name in arrays if name.startswith(prefix)]
    return {name[len(prefix) :]: arrays.pop(name) for name in names}


def _task(
    number: int,
    task: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    encoding: str,
    limits: Limits,
) -> TaskUpdate:
    for field in ("classes", "renamed"):
        if not isinstance(task[field], list):
            raise ValueError(f"{field} {task[field]!r} are not a list")
    renamed = tuple((row, name) for row, name in task["renamed"])
    _rows([row for row, _ in renamed], limits)
    for name in (task["name"], *task["classes"], *(name for _, name in renamed)):
        if problem := name_problem(name, limits):
            raise ValueError(f"name {name!r} {problem}")
    adapted = _adapted(arrays, encoding)
    rows = task["deltas"]
    projections = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    return TaskUpdate(
        number,
        task["name"],
        tuple(task["classes"]),
        magnitudes_from(rows, number, projections, limits),
        HeadUpdate.from_tensors(arrays),
        factors_from(arrays, adapted, encoding=encoding),
        _rows(task["retired"], limits),
        renamed,
    )


def _adapted(arrays: Mapping[str, np.ndarray], encoding: str) -> list[str]:
    """Return the projections that have factors. Raises ValueError for any other tensor."""
    own = [name for name in arrays if not name.startswith(HEAD_PREFIX)]
    names = sorted({name[:-2] for name in own if name.endswith((".A", ".B"))})
    known = {*HEAD, *(f"{name}.{part}" for name in names for part in encodings.parts(encoding))}
    if known != set(arrays):
        raise ValueError(f"unexpected or missing tensors: {sorted(known ^ set(arrays))[:4]}")
    if arrays["head.old.index"].ndim != 1:
        raise ValueError("head.old.index is not a list of rows")
    return names


def _rows(value: Any, limits: Limits) -> tuple[int, ...]:
    """Read row numbers of the head. Raises ValueError unless they ascend."""
    if not isinstance(value, list):
        raise ValueError(f"rows {value!r} are not a list")
    rows = tuple(natural(row, limits.rows - 1) for row in value)
    if any(one >= two for one, two in itertools.pairwise(rows)):
        raise ValueError("rows are not ascending")
    return rows


def magnitudes_from(
    value: Sequence[Any], tasks: int, projections: int, limits: Limits = LIMITS
) -> np.ndarray:
    """Read magnitudes, or their deltas, which JSON has as integers in `UNIT`.

    Args:
        value: One integer for each task, or a list of one for each projection.
        tasks: Number of tasks.
        projections: Number of projections.
        limits: Bounds.

    Returns:
        float64 (tasks,) or (tasks, projections).

    Raises:
        ValueError, TypeError: `value` is anything else.
    """
    shared = not any(isinstance(row, list) for row in value)
    units = [_integer(x) if shared else [_integer(y) for y in x] for x in value]
    found = np.array(units, np.float64) * UNIT
    if found.shape not in ((tasks,), (tasks, projections)):
        raise ValueError(
            f"magnitudes of shape {found.shape} for task {tasks} and {projections} projections"
        )
    if not (np.abs(found) <= limits.magnitude).all():
        raise ValueError(f"a magnitude is above {limits.magnitude}")
    return found


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value


def unverified_manifest(data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """Read what the manifest claims, and who seems to have signed it. NOTHING of it is proved.

    For showing to a person. Raises InputError.
    """
    envelope, table, content = opened(data, limits)
    payload = signing.unverified_payload(envelope.encode("ascii"))
    manifest = parse_exact_json(payload, "the manifest")
    try:
        arrays = {
            name: [str(t.dtype), list(t.shape)] for name, t in tensors(table, content).items()
        }
        tasks = [
            {
                "name": str(t["name"]),
                "classes": [str(c) for c in t["classes"]],
                "retired": [natural(row) for row in t["retired"]],
                "renamed": [[natural(row), str(name)] for row, name in t["renamed"]],
                "revision": natural(t["revision"], limits.revision),
            }
            for t in manifest.pop("tasks", [])
        ]
        kind = str(manifest["kind"])
    except _MALFORMED as error:
        raise InputError(f"the packet does not describe itself: {error!r}") from error
    signed = signing.unverified_keyids(envelope.encode("ascii"))
    return manifest | {"kind": kind, "tasks": tasks, "tensors": arrays, "signed_by": signed}


def name_problem(name: str, limits: Limits = LIMITS) -> str | None:
    """Say why `name` may not be a class or task name. None means that it may."""
    if not isinstance(name, str) or not name.strip():
        return "is empty"
    if len(name) > limits.name:
        return f"is longer than {limits.name} characters"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's NFC form"
    if any(unicodedata.category(c) in _CONTROLS for c in name):
        return "holds a control character"
    if "/" in name or "\\" in name:
        return "holds a path separator"
    return None

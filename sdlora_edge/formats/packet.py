"""The packet that teaches: one task's update, or those of several tasks in a row (a squash). `build` writes it, `read` reads it.

    manifest       {"format", "kind": "update", "lineage", "sequence": t, "from": S_a, "to": S_t, "encoding",
                    "tasks": [{"name", "classes", "revision", "deltas": [alpha_k(i) - alpha_k(i-1), k = 1..i], each a number, or
                               a list of one for each projection} for i = a+1..t],
                    "canary": {"seed", "count"}, "content"}
    tensors        for each task i, with "<i>." before the name:
                   <projection>.A, .B (.A.scale, .B.scale)        as `encoding` says; none for an absorbed task, or a class learned alone
                   head.new.weight, head.new.bias                 float16, float32  (n, features), (n,)   its new classes
                   head.old.index, .step, .scale, .bias           int32, int8, float32, float32           known ones that change
                   and canary.logits                              float32   (count, classes)              after the last task

The file around them is `container`; packets of other kinds (keys, revocations) are `orders`. Where a packet stands against a device
(lineage, order, shapes, finiteness) is `Packet.check`. numpy only.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, NotForThisDevice, NothingToDo, TrustError
from ..state import Projection, TaskState, TaskUpdate, advance, factors_from, next_digest
from . import encoding as encodings
from . import signing
from .canonical import is_sha256, parse_json
from .container import (
    FORMAT,
    LIMITS,
    SUFFIX,
    Limits,
    Sealed,
    Sign,
    natural,
    opened,
    seal,
    tensors,
    unseal,
)
from .encoding import ENCODINGS, HEAD, HeadRows

__all__ = ["FORMAT", "LIMITS", "SUFFIX", "Limits", "Packet", "build", "read", "unverified_manifest"]
KIND = "update"
CANARY = "canary.logits"


@dataclass(frozen=True, eq=False)
class Packet:
    """A packet whose signatures and content have been verified. updates, revisions: of each task, in order."""

    manifest: Mapping[str, Any]
    updates: tuple[TaskUpdate, ...]
    revisions: tuple[int, ...]
    canary_seed: int
    canary_logits: np.ndarray
    digest: str
    """SHA-256 of the file"""

    @property
    def update(self) -> TaskUpdate:
        """The last task's."""
        return self.updates[-1]

    @property
    def first(self) -> int:
        """The number of the first task it brings."""
        return self.updates[0].task

    @property
    def sequence(self) -> int:
        """The number of the last task it brings."""
        return self.update.task

    @property
    def revision(self) -> int:
        """Of the last task."""
        return self.revisions[-1]

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(task, revision) of each task."""
        return list(enumerate(self.revisions, self.first))

    def _led_to(self, flashed: Sequence[int], classes: Sequence[str]) -> bool:
        """Whether it ends before the bundle's own task, and the bundle knows its tasks. The bundle does not record the digests of
        the states before its own, so revisions alone would take a packet of another run for one of these: classes tell them apart."""
        brought = tuple(name for update in self.updates for name in update.classes)
        end = self.canary_logits.shape[1]  # a logit for each class after the last task
        return (
            self.sequence < len(flashed)
            and self.revisions == tuple(flashed[self.first - 1 : self.sequence])
            and brought == tuple(classes[end - len(brought) : end])
        )

    def check(
        self,
        state: TaskState,
        lineage: str,
        projections: Sequence[Projection],
        revision: int = 0,
        flashed: Sequence[int] = (),
    ) -> TaskState:
        """The state after this packet, if it may follow `state`, which came with `revision`.

        flashed: revisions of the tasks that the bundle itself knows. Raises NotForThisDevice, NothingToDo, TrustError (replay) or InputError.
        """
        if self.manifest["lineage"] != lineage:
            raise NotForThisDevice(
                f"packet {self.sequence} belongs to another lineage ({self.manifest['lineage'][:12]}, this bundle is "
                f"{lineage[:12]}): build packets from the run that this bundle was exported from, in the bundle's encoding"
            )
        if self.manifest["to"] in (state.digest, *state.before) or self._led_to(
            flashed, state.classes
        ):
            raise NothingToDo(f"packet {self.sequence} is applied already")
        if self.first <= state.task and self.revision > revision:
            raise NotForThisDevice(
                f"packet {self.sequence} is revision {self.revision} of a task that this device holds in revision {revision}: "
                f"roll back to task {self.first - 1}, or apply the revocation packet, first"
            )
        if self.sequence <= state.task:
            raise TrustError(
                f"packet {self.sequence} is a replay: this device is at task {state.task} already"
            )
        if self.first <= state.task:
            raise NotForThisDevice(
                f"this packet leads from task {self.first - 1} to {self.sequence}, and this device is between, at task "
                f"{state.task}: apply the packets of single tasks, or a squash that begins there"
            )
        if self.first > state.task + 1:
            missing = " and ".join(sorted({str(state.task + 1), str(self.first - 1)}, key=int))
            raise NotForThisDevice(
                f"packet {self.sequence} is out of order: this device is at task {state.task}; apply {missing} first"
            )
        if self.manifest["from"] != state.digest:
            raise NotForThisDevice(
                f"packet {self.sequence} follows another state ({self.manifest['from'][:12]}) than this device is in "
                f"({state.digest[:12]}): the run was trained again after these packets were built"
            )
        known = {p.name: p for p in projections}
        for update in self.updates:
            _check_update(update, state, known, self.manifest["encoding"])
            state = advance(state, update)
        if self.canary_logits.shape[1] != len(state.classes) or not _bounded(state.head_weight):
            raise InputError(
                f"packet {self.sequence}: its canary does not fit {len(state.classes)} classes, or a head row is too large"
            )
        if state.digest != self.manifest["to"]:
            raise InputError(
                f"packet {self.sequence} does not lead to the state it names: build it again"
            )
        return state


def build(
    updates: TaskUpdate | Sequence[TaskUpdate],
    before: TaskState,
    lineage: str,
    canary_seed: int,
    canary_logits: np.ndarray,
    sign: Sign,
    encoding: str = encodings.DEFAULT,
    revisions: Sequence[int] = (),
) -> bytes:
    """The bytes of a packet: one task's update, or those of several in a row. `before`: the state they start from.

    revisions: of each task; none means 0. Raises LimitError where no device would read it.
    """
    updates = [updates] if isinstance(updates, TaskUpdate) else list(updates)
    return _build(
        updates,
        before.digest,
        lineage,
        canary_seed,
        canary_logits,
        sign,
        encoding,
        revisions or [0] * len(updates),
    )


def squash(packets: Sequence[Packet], sign: Sign) -> bytes:
    """One packet of the tasks of several, in order, with the last one's canary. A device ends in the same state, to the bit.

    Raises NotForThisDevice unless each packet follows from the one before it; LimitError where no device would read it.
    """
    for one, two in itertools.pairwise(packets):
        if one.manifest["lineage"] != two.manifest["lineage"]:
            raise NotForThisDevice(
                f"packets {one.sequence} and {two.sequence} are of different lineages"
            )
        if one.manifest["to"] != two.manifest["from"]:
            raise NotForThisDevice(
                f"packet {two.sequence} does not follow from packet {one.sequence}: name all between, once"
            )
    updates = [update for one in packets for update in one.updates]
    revisions = [revision for one in packets for revision in one.revisions]
    begin, last = packets[0].manifest, packets[-1]
    return _build(
        updates,
        begin["from"],
        begin["lineage"],
        last.canary_seed,
        last.canary_logits,
        sign,
        begin["encoding"],
        revisions,
    )


def _build(
    updates: Sequence[TaskUpdate],
    begin: str,
    lineage: str,
    canary_seed: int,
    canary_logits: np.ndarray,
    sign: Sign,
    encoding: str,
    revisions: Sequence[int],
) -> bytes:
    end = begin
    for update in updates:
        end = next_digest(end, update.digest())
    arrays = {f"{u.task}.{name}": array for u in updates for name, array in u.tensors().items()}
    manifest = {
        "kind": KIND,
        "lineage": lineage,
        "sequence": updates[-1].task,
        "from": begin,
        "to": end,
        "encoding": encoding,
        "tasks": [
            {
                "name": u.name,
                "classes": list(u.classes),
                "revision": revision,
                "deltas": u.deltas.tolist(),
            }
            for u, revision in zip(updates, revisions, strict=True)
        ],
        "canary": {"seed": canary_seed, "count": len(canary_logits)},
    }
    return seal(manifest, arrays | {CANARY: canary_logits.astype(np.float32)}, sign)


def read(data: bytes, trust: signing.Trust, limits: Limits = LIMITS) -> Packet:
    """Verify a packet and read it.

    Raises InputError (not a whole packet, not one of ours, or one that brings no task), LimitError (too large), TrustError.
    """
    return parse(unseal(data, trust, limits), limits)


def parse(sealed: Sealed, limits: Limits = LIMITS) -> Packet:
    """A verified file of this kind. Raises InputError."""
    if sealed.manifest.get("kind") != KIND:
        raise InputError(f"a packet of kind {sealed.manifest.get('kind')!r} brings no task")
    try:
        return _parse(sealed.manifest, sealed.tensors(), sealed.digest, limits)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"the packet's manifest does not describe its tensors: {error!r}"
        ) from error


def unverified_manifest(data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """What the manifest claims, and who seems to have signed it, for showing to a person: NOTHING is proved. Raises InputError."""
    envelope, table, content = opened(data, limits)
    manifest = parse_json(signing.unverified_payload(envelope.encode("ascii")), "the manifest")
    try:
        arrays = {
            name: [str(t.dtype), list(t.shape)] for name, t in tensors(table, content).items()
        }
        tasks = [
            {
                "name": str(t["name"]),
                "classes": [str(c) for c in t["classes"]],
                "revision": natural(t["revision"], limits.revision),
            }
            for t in manifest.pop("tasks", [])
        ]
        kind = str(manifest["kind"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the packet does not describe itself: {error!r}") from error
    signed = signing.unverified_keyids(envelope.encode("ascii"))
    return manifest | {"kind": kind, "tasks": tasks, "tensors": arrays, "signed_by": signed}


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


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def magnitudes_from(
    value: Sequence[Any], tasks: int, projections: int, limits: Limits = LIMITS
) -> np.ndarray:
    """Magnitudes or their deltas, float64 (tasks,) or (tasks, projections). Raises ValueError, TypeError for anything else."""
    shared = not any(isinstance(row, (list, tuple)) for row in value)
    found = np.array([_number(x) if shared else [_number(y) for y in x] for x in value], np.float64)
    if (
        found.shape not in ((tasks,), (tasks, projections))
        or not (np.abs(found) <= limits.magnitude).all()
    ):
        raise ValueError(
            f"magnitudes of shape {found.shape} for task {tasks} and {projections} projections, or one out of bounds"
        )
    return found


def _parse(
    manifest: Mapping[str, Any], arrays: dict[str, np.ndarray], digest: str, limits: Limits
) -> Packet:
    sequence, tasks = natural(manifest["sequence"], limits.sequence), manifest["tasks"]
    if manifest["encoding"] not in ENCODINGS:
        raise ValueError(f"encoding {manifest['encoding']!r} is unknown")
    for field in ("lineage", "from", "to"):
        if not is_sha256(manifest[field]):
            raise ValueError(f"{field} is no SHA-256")
    if not (isinstance(tasks, list) and 1 <= len(tasks) <= min(sequence, limits.tasks)):
        raise ValueError(
            f"it brings no task, too many, or more than its sequence {sequence} allows"
        )
    logits = arrays.pop(CANARY)
    count = natural(manifest["canary"]["count"], limits.canary_inputs)
    if not (
        logits.dtype == np.float32
        and logits.ndim == 2
        and 1 <= len(logits) == count
        and np.isfinite(logits).all()
    ):
        raise ValueError(f"canary of shape {logits.shape}")
    updates = []
    for number, task in enumerate(tasks, sequence - len(tasks) + 1):
        prefix = f"{number}."
        own = {
            name[len(prefix) :]: arrays.pop(name)
            for name in list(arrays)
            if name.startswith(prefix)
        }
        updates.append(_task(number, task, own, manifest["encoding"], limits))
    if arrays:
        raise ValueError(f"unexpected tensors: {sorted(arrays)[:4]}")
    revisions = tuple(natural(task["revision"], limits.revision) for task in tasks)
    if list(revisions) != sorted(revisions):
        raise ValueError("a later task has a lower revision")
    return Packet(
        manifest,
        tuple(updates),
        revisions,
        natural(manifest["canary"]["seed"], limits.seed),
        logits,
        digest,
    )


def _task(
    number: int,
    task: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    encoding: str,
    limits: Limits,
) -> TaskUpdate:
    if not isinstance(task["classes"], list):
        raise ValueError(f"classes {task['classes']!r} are not a list")
    for name in (task["name"], *task["classes"]):
        if problem := name_problem(name, limits):
            raise ValueError(f"name {name!r} {problem}")
    rows = task["deltas"]
    deltas = magnitudes_from(
        rows, number, len(rows[0]) if rows and isinstance(rows[0], list) else 0, limits
    )
    head = HeadRows.from_tensors(arrays)
    if head.index.ndim != 1:
        raise ValueError("head.old.index is not a list of rows")
    names = sorted({name[:-2] for name in arrays if name.endswith((".A", ".B"))})
    known = {*HEAD, *(f"{name}.{part}" for name in names for part in encodings.parts(encoding))}
    if known != set(arrays):
        raise ValueError(f"unexpected or missing tensors: {sorted(known ^ set(arrays))[:4]}")
    return TaskUpdate(
        number,
        task["name"],
        tuple(task["classes"]),
        deltas,
        head,
        factors_from(arrays, names, encoding=encoding),
    )


def _bounded(array: np.ndarray, bound: float = LIMITS.magnitude) -> bool:
    """No NaN, no infinity, nothing beyond the bound."""
    return bool((np.abs(array.astype(np.float32)) <= bound).all())


def _check_update(
    update: TaskUpdate, state: TaskState, projections: Mapping[str, Projection], encoding: str
) -> None:
    """Shapes, dtypes and values of one task's update against the state it follows. Raises InputError."""
    known, head = len(state.classes), update.head
    if len(set(state.classes + update.classes)) != known + len(update.classes):
        raise InputError(f"packet {update.task} names a class twice, or one that is known already")
    n, m, features = len(update.classes), len(head.index), state.head_weight.shape[1]
    magnitudes = (len(projections),) if update.deltas.ndim == 2 else ()
    if update.deltas.shape[1:] != magnitudes or (
        state.task and state.magnitudes.ndim != update.deltas.ndim
    ):
        raise InputError(
            f"packet {update.task}: magnitude deltas of shape {update.deltas.shape} do not follow this state's"
        )
    expected: list[tuple[str, np.ndarray, Any, tuple[int, ...]]] = [
        ("head.new.weight", head.new_weight, np.float16, (n, features)),
        ("head.new.bias", head.new_bias, np.float32, (n,)),
        ("head.old.index", head.index, np.int32, (m,)),
        ("head.old.step", head.step, np.int8, (m, features)),
        ("head.old.scale", head.scale, np.float32, (m,)),
        ("head.old.bias", head.bias, np.float32, (m,)),
    ]
    for name, factors in update.factors.items():
        if (p := projections.get(name)) is None:
            raise InputError(
                f"packet {update.task} adapts {name!r}, which this bundle does not have"
            )
        if encoding == "int4" and (p.columns % 2 or (p.stop - p.start) % 2):
            raise InputError(
                f"packet {update.task}: {name} has an odd width, which int4 cannot carry"
            )
        rank = factors.stored["A"].shape[0] if factors.stored["A"].ndim == 2 else 0
        if rank < 1:
            raise InputError(f"packet {update.task}: {name}.A has no rows")
        for part, shape in encodings.shapes(encoding, rank, p.stop - p.start, p.columns).items():
            dtype = (encodings.SCALE_DTYPES if part.endswith(".scale") else encodings.DTYPES)[
                encoding
            ]
            expected.append((f"{name}.{part}", factors.stored[part], dtype, shape))
    for name, array, dtype, shape in expected:
        if array.dtype != dtype or array.shape != shape:
            raise InputError(
                f"packet {update.task}: {name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}{shape}"
            )
        # a scale is multiplied with whole numbers down to -128, and is never negative
        scale = name.endswith(".scale")
        if dtype != np.int32 and not (
            _bounded(array, LIMITS.magnitude / (128 if scale else 1))
            and not (scale and (array < 0).any())
        ):
            raise InputError(
                f"packet {update.task}: {name} holds NaN, infinity or a value out of bounds"
            )
    index = head.index.astype(np.int64)
    if (np.diff(index) <= 0).any() or (index < 0).any() or (index >= known).any():
        raise InputError(
            f"packet {update.task}: head.old.index is not ascending within {known} classes"
        )

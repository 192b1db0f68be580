"""What public functions return: frozen dataclasses. `to_dict()` is what `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """The base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: paths as strings, tuples as lists, results as objects."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class KeyFiles(Result):
    """A key pair that was written: its files, its id, and whether the private key is encrypted."""

    private: Path
    public: Path
    keyid: str
    encrypted: bool


@dataclass(frozen=True)
class Status(Result):
    """Where a device stands.

    Args:
        generation: Counter of the generation that is served; 0 if it is only a part of a damaged
            generation.
        task: Number of the last task in it.
        task_name: Name of that task.
        revision: Revision of that task.
        highest_task: Task of the newest packet ever confirmed here; a rollback does not lower it.
        revoked: (task, revision) pairs that are never accepted again.
        trust_version: Version of the keys in force; 0 if a packet of keys is damaged.
        state: State digest S_t.
        lineage: State digest S_0.
        bundle: Bundle id.
        model: Name of the backbone.
        target: What runs the model.
        precision: Precision of the weights that are not adapted.
        classes: Names of the live classes; retired ones are left out.
        temperature: Logits are divided by it before they become probabilities.
        threshold: Images with a lower score are unknown; None if every image counts as known.
        packets: Number of packets applied on top of the bundle.
        store_bytes: Bytes on disk of each part of the store.
        damage: One line for each damaged file; empty if the store is intact.
    """

    generation: int
    task: int
    task_name: str
    revision: int
    highest_task: int
    revoked: tuple[tuple[int, int], ...]
    trust_version: int
    state: str
    lineage: str
    bundle: str
    model: str
    target: str
    precision: str
    classes: tuple[str, ...]
    temperature: float
    threshold: float | None
    packets: int
    store_bytes: Mapping[str, int]
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Applied(Status):
    """A device's status after a packet.

    Args:
        kind: "update", "trust" or "revocation".
        canary_difference: Largest difference of the canary; None if the engine runs no model.
        apply_ms: Milliseconds from the call to the commit.
    """

    kind: str
    canary_difference: float | None
    apply_ms: float


@dataclass(frozen=True)
class AppliedPacket(Result):
    """A packet that `apply_all` has put in force.

    Args:
        file: Its file.
        kind: "update", "trust" or "revocation".
        task: Number of the device's task after it.
        task_name: Name of that task.
        generation: Counter of the generation that put it in force. Updates in a row share one.
        canary_difference: Largest difference of that generation's canary; None if the engine runs
            no model.
        apply_ms: Milliseconds from the call to that generation's commit.
    """

    file: Path
    kind: str
    task: int
    task_name: str
    generation: int
    canary_difference: float | None
    apply_ms: float


@dataclass(frozen=True)
class SkippedPacket(Result):
    """A packet that the device holds already, or that changes nothing, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class AppliedAll(Status):
    """A device's status after several packets.

    Args:
        applied: The packets that came into force, in order.
        skipped: Those that did not have to.
        canary_difference: Largest difference of the last canary; None if none was run.
        apply_ms: Milliseconds from the call to the last commit.
    """

    applied: tuple[AppliedPacket, ...]
    skipped: tuple[SkippedPacket, ...]
    canary_difference: float | None
    apply_ms: float


@dataclass(frozen=True)
class Damage(Result):
    """A damaged or missing file of a store, relative to it, and what to do about it."""

    file: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Served(Result):
    """The generation and the task that can be served."""

    generation: int
    task: int


@dataclass(frozen=True)
class Untried(Result):
    """Why the model could not be tried: the message and the exit code of the error."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Verification(Result):
    """What `device verify` found.

    Args:
        intact: No file is damaged.
        damage: The damaged files.
        leftovers: Files that no record names; the next update removes them.
        files: Number of files that were compared.
        bytes: Their size.
        serves: What can be served in spite of the damage; None if nothing can.
        untried: Why the model was not tried, which says nothing about the store; None if it was
            tried.
    """

    intact: bool
    damage: tuple[Damage, ...]
    leftovers: tuple[str, ...]
    files: int
    bytes: int
    serves: Served | None
    untried: Untried | None


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        raise TypeError(f"{type(value).__name__} is not a Result")
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value

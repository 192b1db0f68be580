"""May this packet follow? The tables of docs/packet.md, one rule for each row, in the same order.

Everything here is pure: no disk, no clock, no engine. Rules are tried in order, and the first that
refuses decides. Their order is part of the format: two programs that tried them in another order
would refuse one packet for different reasons, and exit with different codes.

The signatures have been verified before, and the canary is run after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from .errors import InputError, NotForThisDevice, NothingToDo, SdloraError, TrustError
from .formats.control import Revocation, Revoked, Rotation
from .formats.lead import lead
from .formats.packet import Packet
from .formats.signing import Trust
from .state import Projection, TaskState

NOBODY = Trust((), 1, version=0)
"""In force if a packet of keys is damaged: nothing is accepted until that packet came again."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a device stands when a packet arrives.

    Attributes:
        lineage: S_0 of its bundle.
        projections: Of its bundle, in order.
        state: The state it serves.
        revision: Of the packet that led to that state. At first, the bundle's.
        confirmed: The highest (revision, task) that this device ever confirmed. At first, the
            bundle's. It does not fall if the device rolls back.
        revoked: What this device never accepts again.
        capacity: Rows that the model has room for. 0 means any number.
        allow_older: A person asked for a packet that was rolled back.
    """

    lineage: str
    projections: tuple[Projection, ...]
    state: TaskState
    revision: int = 0
    confirmed: tuple[int, int] = (-1, -1)
    revoked: tuple[Revoked, ...] = ()
    capacity: int = 0
    allow_older: bool = False


@dataclass(frozen=True, eq=False)
class UpdateCase:
    """A verified packet that brings tasks, and the device that it comes to."""

    packet: Packet
    standing: Standing

    @cached_property
    def after(self) -> TaskState:
        """The state after the packet. Raises InputError."""
        return lead(self.packet, self.standing.state, self.standing.projections)


@dataclass(frozen=True, eq=False)
class KeysCase:
    """A verified change of keys, and the keys in force."""

    rotation: Rotation
    current: Trust


@dataclass(frozen=True, eq=False)
class RevocationCase:
    """A verified revocation, and what it comes to.

    Attributes:
        lineage: S_0 of the device's bundle.
        flashed: Revisions of the tasks 1 to e, which the bundle itself knows.
        known: What this device has revoked before.
    """

    revocation: Revocation
    lineage: str
    flashed: Sequence[int]
    known: Sequence[Revoked]


@dataclass(frozen=True)
class Rule(Generic[T]):
    """A reason to refuse a packet.

    Attributes:
        name: The row of the table in docs/packet.md.
        problem: Says what is wrong and what to do, or nothing if the rule does not apply.
        error: What a refusal raises.
    """

    name: str
    problem: Callable[[T], str]
    error: type[SdloraError]


def accept_update(packet: Packet, standing: Standing) -> TaskState:
    """Return the state after a packet that may follow.

    Raises:
        InputError, TrustError, NotForThisDevice, NothingToDo: By the first of UPDATES that refuses.
    """
    case = UpdateCase(packet, standing)
    _apply(UPDATES, case)
    return case.after


def accept_keys(case: KeysCase) -> None:
    """Return if new keys may come into force. Raises what the first of KEYS says."""
    _apply(KEYS, case)


def accept_revocation(case: RevocationCase) -> None:
    """Return if a revocation may be obeyed. Raises what the first of REVOCATIONS says."""
    _apply(REVOCATIONS, case)


def require_not_revoked(packet: Packet, revoked: Iterable[Revoked]) -> None:
    """Raise TrustError if a revocation covers a task of the packet."""
    if problem := _covered(packet, revoked):
        raise TrustError(problem)


def _apply(rules: Sequence[Rule[T]], case: T) -> None:
    for rule in rules:
        if problem := rule.problem(case):
            raise rule.error(problem)


# Packets that bring tasks. A packet leads from task a to task t, and the device is at task s.


def _another_lineage(case: UpdateCase) -> str:
    packet, standing = case.packet, case.standing
    if packet.lineage == standing.lineage:
        return ""
    return (
        f"packet {packet.sequence} belongs to another lineage ({packet.lineage[:12]}, this bundle "
        f"is {standing.lineage[:12]}): build packets from the run that this bundle was exported "
        "from, in the bundle's encoding"
    )


def _applied(case: UpdateCase) -> str:
    """`to` is S, or led to S. A bundle names all its states, so this holds for its own tasks too.

    Class names are part of a state: no packet of another run is mistaken for one of these.
    """
    if case.packet.end in case.standing.state.states:
        return f"packet {case.packet.sequence} is applied already"
    return ""


def _newer_revision(case: UpdateCase) -> str:
    """a + 1 <= s, in a revision above the one held. Before replay, because this has a remedy."""
    packet, standing = case.packet, case.standing
    if packet.first > standing.state.task or packet.revision <= standing.revision:
        return ""
    return (
        f"packet {packet.sequence} is revision {packet.revision} of a task that this device holds "
        f"in revision {standing.revision}: roll back to task {packet.first - 1}, or apply the "
        "revocation packet, first"
    )


def _replay(case: UpdateCase) -> str:
    """t <= s: another packet of an old task."""
    task = case.standing.state.task
    if case.packet.sequence > task:
        return ""
    return f"packet {case.packet.sequence} is a replay: this device is at task {task} already"


def _squash_over(case: UpdateCase) -> str:
    """a + 1 <= s < t: the device is between the squash's first and last task."""
    packet, task = case.packet, case.standing.state.task
    if packet.first > task:
        return ""
    return (
        f"this packet leads from task {packet.first - 1} to {packet.sequence}, but this device is "
        f"between them, at task {task}: apply the packets of single tasks, or a squash that begins "
        f"at task {task}"
    )


def _out_of_order(case: UpdateCase) -> str:
    """a > s."""
    packet, task = case.packet, case.standing.state.task
    if packet.first == task + 1:
        return ""
    missing = " and ".join(sorted({str(task + 1), str(packet.first - 1)}, key=int))
    return (
        f"packet {packet.sequence} is out of order: this device is at task {task}; apply {missing} "
        "first"
    )


def _fork(case: UpdateCase) -> str:
    """a = s, but `from` is not S."""
    packet, digest = case.packet, case.standing.state.digest
    if packet.begin == digest:
        return ""
    return (
        f"packet {packet.sequence} follows another state ({packet.begin[:12]}) than this device is "
        f"in ({digest[:12]}): the run was trained again after these packets were built"
    )


def _damaged(case: UpdateCase) -> str:
    """A value, shape or name is wrong, or the tasks do not lead to `to`."""
    try:
        _ = case.after
    except InputError as error:
        return str(error)
    return ""


def _revoked(case: UpdateCase) -> str:
    return _covered(case.packet, case.standing.revoked)


def _covered(packet: Packet, revoked: Iterable[Revoked]) -> str:
    known = list(revoked)
    for task, revision in packet.versions:
        if any(r.covers(task, revision) for r in known):
            return f"packet {task} in revision {revision} was revoked: get a newer revision of it"
    return ""


def _not_newer(case: UpdateCase) -> str:
    """Compared by revision first: a newer revision of an old task is newer than any older one."""
    packet, confirmed = case.packet, case.standing.confirmed
    if case.standing.allow_older or (packet.revision, packet.sequence) > confirmed:
        return ""
    return (
        f"packet {packet.sequence} is not newer than packet {confirmed[1]}, which this device has "
        "confirmed and then rolled back; to take it again on purpose, use --allow-older"
    )


def _no_room(case: UpdateCase) -> str:
    rows, capacity = len(case.after.classes), case.standing.capacity
    if not 0 < capacity < rows:
        return ""
    return (
        f"{rows} classes (retired ones keep their place) are beyond this bundle's capacity of "
        f"{capacity}: export one with --max-classes {rows} or more"
    )


UPDATES = (
    Rule("another lineage", _another_lineage, NotForThisDevice),
    Rule("applied already", _applied, NothingToDo),
    Rule("a newer revision of a task that is held", _newer_revision, NotForThisDevice),
    Rule("replay", _replay, TrustError),
    Rule("a squash over the device's state", _squash_over, NotForThisDevice),
    Rule("out of order", _out_of_order, NotForThisDevice),
    Rule("fork", _fork, NotForThisDevice),
    Rule("damaged content", _damaged, InputError),
    Rule("revoked", _revoked, TrustError),
    Rule("not newer than ever confirmed", _not_newer, TrustError),
    Rule("no room", _no_room, NotForThisDevice),
)


# Packets that change the keys.


def _same_keys(case: KeysCase) -> str:
    if case.rotation.trust != case.current:
        return ""
    return f"keys of version {case.current.version} are in force already"


def _old_keys(case: KeysCase) -> str:
    """Versions only rise: who has an old key could otherwise put old keys back in force."""
    new, current = case.rotation.trust.version, case.current.version
    if new > current:
        return ""
    return (
        f"these keys are version {new}, and this device has seen version {current}: make a newer "
        "trust packet with sdlora-edge packet trust"
    )


KEYS = (
    Rule("keys in force already", _same_keys, NothingToDo),
    Rule("keys of an old version", _old_keys, TrustError),
)


# Revocations.


def _lineage_of_another(case: RevocationCase) -> str:
    revocation = case.revocation
    if revocation.lineage == case.lineage:
        return ""
    return (
        f"the revocation of task {revocation.revoked.sequence} is for another lineage "
        f"({revocation.lineage[:12]}): get the one for this device's bundle"
    )


def _revoked_already(case: RevocationCase) -> str:
    new = case.revocation.revoked
    if not any(known.covers(new.sequence, new.revision) for known in case.known):
        return ""
    return f"task {new.sequence} in revision {new.revision} is revoked already"


def _part_of_the_bundle(case: RevocationCase) -> str:
    inside = [t for t, r in enumerate(case.flashed, 1) if case.revocation.revoked.covers(t, r)]
    if not inside:
        return ""
    return (
        f"the revoked task {inside[0]} is part of the bundle itself, which knows task "
        f"{len(case.flashed)}: flash this device with another bundle"
    )


REVOCATIONS = (
    Rule("revocation of another lineage", _lineage_of_another, NotForThisDevice),
    Rule("revoked already", _revoked_already, NothingToDo),
    Rule("a task of the bundle itself", _part_of_the_bundle, NotForThisDevice),
)

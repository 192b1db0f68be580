"""Packets that bring no task but an order: other keys, or a revocation. And `read_any`, which reads a packet of every kind.

    keys      {"format", "kind": "trust", "trust": {"version", "threshold", "keys"}, "content"}
              signed by enough of the keys it replaces AND by enough of those it names
    revocation    {"format", "kind": "revocation", "lineage", "sequence": t, "revision": r, "content"}
              a device goes back to before task t, if it holds t in a revision up to r, and takes nothing ever again that brings
              task t, or one after it, in a revision up to r

The file is that of `container`, with an empty tensor table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, LimitError, NothingToDo, TrustError, naming
from ..storage import atomic
from . import packet, signing
from .canonical import is_sha256
from .container import LIMITS, Limits, Sealed, Sign, natural, seal, unseal
from .packet import Packet

TRUST, REVOCATION = "trust", "revocation"
MAX_KEYS = signing.MAX_SIGNATURES


@dataclass(frozen=True, eq=False)
class Rotation:
    """Other keys, signed by both the old ones and the new. digest: SHA-256 of the file."""

    trust: signing.Trust
    digest: str

    def check(self, current: signing.Trust) -> None:
        """May it follow the keys in force? Raises NothingToDo, or TrustError for an older version."""
        if self.trust == current:
            raise NothingToDo(f"keys of version {current.version} are in force already")
        if self.trust.version <= current.version:
            raise TrustError(
                f"these keys are version {self.trust.version}, and this device has seen version {current.version}: "
                "make a newer trust packet with sdlora-edge packet trust"
            )


@dataclass(frozen=True, order=True)
class Revoked:
    """Task `sequence`, and every one after it, in a revision up to `revision`."""

    sequence: int
    revision: int

    def covers(self, sequence: int, revision: int) -> bool:
        return sequence >= self.sequence and revision <= self.revision


@dataclass(frozen=True, eq=False)
class Revocation:
    """A revocation. digest: SHA-256 of the file."""

    lineage: str
    revoked: Revoked
    digest: str


def with_revocation(
    known: Iterable[Revoked], new: Revoked, limits: Limits = LIMITS
) -> tuple[Revoked, ...]:
    """All revocations, without those that others cover: one for each revision at the most. Raises LimitError for one too many."""
    known = list(known)
    if any(r.covers(new.sequence, new.revision) for r in known):
        return tuple(known)
    found = sorted([r for r in known if not new.covers(r.sequence, r.revision)] + [new])
    if len(found) > limits.revocations:
        raise LimitError(
            f"this device remembers {limits.revocations} revocations, and no more: revoke an earlier task, which covers later ones, "
            "or flash the device with another bundle"
        )
    return tuple(found)


def build_trust(trust: signing.Trust, sign: Sign) -> bytes:
    """The bytes of a packet that puts `trust` in force."""
    return seal({"kind": TRUST, "trust": trust.to_dict()}, {}, sign)


def build_revocation(lineage: str, revoked: Revoked, sign: Sign) -> bytes:
    """The bytes of a revocation."""
    named = {"sequence": revoked.sequence, "revision": revoked.revision}
    return seal({"kind": REVOCATION, "lineage": lineage, **named}, {}, sign)


def read_any(
    data: bytes, trust: signing.Trust, limits: Limits = LIMITS
) -> Packet | Rotation | Revocation:
    """Verify a packet of any kind and read it. Raises InputError, LimitError, TrustError."""
    sealed = unseal(data, trust, limits)
    kind = sealed.manifest.get("kind")
    if kind == packet.KIND:
        return packet.parse(sealed, limits)
    if kind not in (TRUST, REVOCATION):
        raise InputError(f"a packet of kind {kind!r}: update this program")
    if sealed.table or sealed.content:
        raise InputError(f"a packet of kind {kind} carries tensors")
    try:
        return _rotation(sealed, limits) if kind == TRUST else _revocation(sealed, limits)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the packet's manifest is malformed: {error!r}") from error


def _rotation(sealed: Sealed, limits: Limits) -> Rotation:
    if set(sealed.manifest) != {"format", "kind", "trust", "content"}:
        raise ValueError("fields are missing or unknown")
    keys = len(sealed.manifest["trust"]["keys"])
    if not 1 <= keys <= MAX_KEYS:  # first: to look at a key takes time
        raise InputError(f"a trust packet names {keys} keys: between 1 and {MAX_KEYS} are allowed")
    trust = signing.Trust.from_dict(sealed.manifest["trust"])
    natural(trust.version, limits.revision)
    try:
        signing.verify(sealed.envelope, trust)
    except TrustError as error:
        raise TrustError(f"the new keys have not signed it themselves: {error}") from error
    return Rotation(trust, sealed.digest)


def _revocation(sealed: Sealed, limits: Limits) -> Revocation:
    if set(sealed.manifest) != {"format", "kind", "lineage", "sequence", "revision", "content"}:
        raise ValueError("fields are missing or unknown")
    if not is_sha256(sealed.manifest["lineage"]):
        raise ValueError("lineage is no SHA-256")
    sequence = natural(sealed.manifest["sequence"], limits.sequence)
    if sequence < 1:
        raise ValueError("sequence 0 cannot be revoked: it is part of every bundle")
    revoked = Revoked(sequence, natural(sealed.manifest["revision"], limits.revision))
    return Revocation(sealed.manifest["lineage"], revoked, sealed.digest)


def follow_trust(trust: signing.Trust, packets: Sequence[Path | bytes]) -> signing.Trust:
    """The keys in force after these trust packets, in order. Raises what `read_any` and `Rotation.check` raise."""
    for one in packets:
        with naming(one) if isinstance(one, Path) else nullcontext():
            order = read_any(
                atomic.receive(one, LIMITS.packet) if isinstance(one, Path) else one, trust
            )
            if not isinstance(order, Rotation):
                raise InputError("this packet changes no keys: name trust packets only")
            order.check(trust)
        trust = order.trust
    return trust

"""Control packets: they bring no task but other keys, or a revocation. `read_any` reads all kinds.

    keys         {"format", "kind": "trust", "trust": {"version", "threshold", "keys"}, "content"}
                 signed by enough of the keys it replaces AND by enough of those it names
    revocation   {"format", "kind": "revocation", "lineage", "sequence": t, "revision": r,
                 "content"}
                 a device goes back to before task t if it holds t in a revision up to r, and never
                 again accepts task t, or a later one, in a revision up to r

The file is that of `container`, with an empty tensor table. Whether a device accepts a control
packet is decided in `acceptance`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError, LimitError, TrustError
from . import packet, signing
from .canonical import is_sha256
from .container import Sealed, Sign, seal, unseal
from .limits import LIMITS, Limits, natural
from .packet import Packet

TRUST, REVOCATION = "trust", "revocation"


@dataclass(frozen=True, eq=False)
class Rotation:
    """A change of keys, signed by both the old keys and the new.

    Attributes:
        digest: SHA-256 of the file.
    """

    trust: signing.Trust
    digest: str


@dataclass(frozen=True, order=True)
class Revoked:
    """Task `sequence`, and every later one, in a revision up to `revision`."""

    sequence: int
    revision: int

    def covers(self, sequence: int, revision: int) -> bool:
        """Tell whether this revokes a task in a revision."""
        return sequence >= self.sequence and revision <= self.revision


@dataclass(frozen=True, eq=False)
class Revocation:
    """A revocation.

    Attributes:
        digest: SHA-256 of the file.
    """

    lineage: str
    revoked: Revoked
    digest: str


def with_revocation(
    known: Iterable[Revoked], new: Revoked, limits: Limits = LIMITS
) -> tuple[Revoked, ...]:
    """Return all revocations, without those that others cover: at most one for each revision.

    Raises:
        LimitError: There would be more than a device remembers.
    """
    known = list(known)
    if any(r.covers(new.sequence, new.revision) for r in known):
        return tuple(known)
    found = sorted([r for r in known if not new.covers(r.sequence, r.revision)] + [new])
    if len(found) > limits.revocations:
        raise LimitError(
            f"this device remembers {limits.revocations} revocations, and no more: revoke an "
            "earlier task, which covers later ones, or flash the device with another bundle"
        )
    return tuple(found)


def build_trust(trust: signing.Trust, sign: Sign) -> bytes:
    """Write a packet that puts `trust` in force."""
    return seal({"kind": TRUST, "trust": trust.to_dict()}, {}, sign)


def build_revocation(lineage: str, revoked: Revoked, sign: Sign) -> bytes:
    """Write a revocation."""
    named = {"sequence": revoked.sequence, "revision": revoked.revision}
    return seal({"kind": REVOCATION, "lineage": lineage, **named}, {}, sign)


def read_any(
    data: bytes, trust: signing.Trust, limits: Limits = LIMITS
) -> Packet | Rotation | Revocation:
    """Verify a packet of any kind and read it.

    Raises:
        InputError: The file is damaged, or is not a packet that this program knows.
        LimitError: The file is too large.
        TrustError: Signatures are missing.
    """
    sealed = unseal(data, trust, limits)
    kind = sealed.manifest.get("kind")
    if kind == packet.KIND:
        return packet.parse(sealed, limits)
    if kind not in (TRUST, REVOCATION):
        raise InputError(f"packet kind {kind!r} is unknown: update this program")
    if sealed.table or sealed.content:
        raise InputError(f"a packet of kind {kind} has tensors, which it must not have")
    try:
        return _rotation(sealed, limits) if kind == TRUST else _revocation(sealed, limits)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the packet's manifest is malformed: {error!r}") from error


def _rotation(sealed: Sealed, limits: Limits) -> Rotation:
    if set(sealed.manifest) != {"format", "kind", "trust", "content"}:
        raise ValueError("fields are missing or unknown")
    keys = len(sealed.manifest["trust"]["keys"])
    # Before any key is read: checking a key takes milliseconds.
    if not 1 <= keys <= limits.keys:
        raise InputError(
            f"a trust packet names {keys} keys: between 1 and {limits.keys} are allowed"
        )
    trust = signing.Trust.from_dict(sealed.manifest["trust"])
    natural(trust.version, limits.revision)
    # The new keys sign too, so a fleet is never handed to keys that nobody holds.
    try:
        signing.verify(sealed.envelope, trust)
    except TrustError as error:
        raise TrustError(f"the new keys have not signed it: {error}") from error
    return Rotation(trust, sealed.digest)


def _revocation(sealed: Sealed, limits: Limits) -> Revocation:
    if set(sealed.manifest) != {"format", "kind", "lineage", "sequence", "revision", "content"}:
        raise ValueError("fields are missing or unknown")
    if not is_sha256(sealed.manifest["lineage"]):
        raise ValueError("lineage is not a SHA-256")
    sequence = natural(sealed.manifest["sequence"], limits.sequence)
    if sequence < 1:
        raise ValueError("sequence 0 cannot be revoked: it is part of every bundle")
    revoked = Revoked(sequence, natural(sealed.manifest["revision"], limits.revision))
    return Revocation(sealed.manifest["lineage"], revoked, sealed.digest)

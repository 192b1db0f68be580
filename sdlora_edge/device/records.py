"""A generation record: a device's packets, its keys, and what it never accepts again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import InputError
from ..formats.canonical import dump_json, parse_exact_json, sha256
from ..formats.control import Revoked, with_revocation
from ..formats.fields import Kind, digest, either, listed, record, text, whole
from ..formats.limits import LIMITS
from ..formats.packet import Packet

FORMAT = "sdlora-edge/store/2"
PENDING, CONFIRMED, FAILED = "pending", "confirmed", "failed"
RECORD_LIMIT = 4 * 1024 * 1024
"""bytes: 30,000 packets"""
COUNTER_LIMIT = 2**53 - 1
MOST = 100_000
"""packets of a record; RECORD_LIMIT is reached before"""


def _pair(value: Any) -> None:
    """A packet of keys: its digest, and the place in `packets` from which on it is in force."""
    name, place = value
    digest(name)
    whole(0, MOST)(place)


_COVERED = record({"sequence": whole(0, LIMITS.sequence), "revision": whole(0, LIMITS.revision)})
KINDS: dict[str, Kind] = {
    "counter": whole(0, COUNTER_LIMIT),
    "status": text(),
    "packets": listed(digest, 0, MOST),
    "highest": whole(0, LIMITS.sequence),
    "revision": whole(0, LIMITS.revision),
    "trust": listed(_pair, 0, MOST),
    "revoked": listed(_COVERED, 0, LIMITS.revocations),
    "bundle": either(digest, text(0)),
    "before": lambda value: None,  # `Generation._from_body` reads it in the same way
}
"""What a record holds beside `format` and `checksum`."""


@dataclass(frozen=True)
class Generation:
    """One record.

    Args:
        counter: Number of the generation; each commit takes the next one.
        status: CONFIRMED; PENDING while the generation is being made; FAILED if it could not be.
        packets: Digests of the applied packets, in order.
        highest: Task of the newest packet ever confirmed on this device. Newer means a higher
            (revision, task).
        revision: Revision of that packet.
        trust: Packets of keys, in order, as (digest, n): in force for the n-th of `packets` (from
            0) and later ones.
        revoked: What is never accepted again.
        bundle: Id of the bundle that the store was made with.
        before: In a record that is not confirmed, the one that was in force when it was written.
    """

    counter: int
    status: str
    packets: tuple[str, ...]
    highest: int
    revision: int = 0
    trust: tuple[tuple[str, int], ...] = ()
    revoked: tuple[Revoked, ...] = ()
    bundle: str = ""
    before: Generation | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Every packet that this record needs, of tasks and of keys."""
        return (*self.packets, *(name for name, _ in self.trust))

    def confirmed(self) -> Generation:
        """The same, in force."""
        return replace(self, status=CONFIRMED, before=None)

    def without(self, count: int) -> Generation:
        """The record without its last `count` packets.

        The keys stay: a rollback never brings old keys back.
        """
        packets = self.packets[: len(self.packets) - count]
        trust = tuple((name, min(n, len(packets))) for name, n in self.trust)
        return replace(self, packets=packets, trust=trust)

    def with_packet(self, name: str, packet: Packet) -> Generation:
        """The record with one packet more.

        A task of revision r > 0 replaces all lower revisions of it, and what was built on them:
        they count as revoked.
        """
        newest = max((self.revision, self.highest), (packet.revision, packet.sequence))
        revoked = self.revoked
        for sequence, revision in packet.versions:
            if revision:
                revoked = with_revocation(revoked, Revoked(sequence, revision - 1))
        return replace(
            self,
            packets=(*self.packets, name),
            revision=newest[0],
            highest=newest[1],
            revoked=revoked,
        )

    def to_json(self) -> bytes:
        """Canonical JSON with a checksum over the rest."""
        body = {"format": FORMAT, **asdict(self)}
        return dump_json({**body, "checksum": sha256(dump_json(body))})

    @classmethod
    def from_json(cls, data: bytes) -> Generation:
        """Raises InputError unless these are exactly the bytes that `to_json` makes."""
        body = parse_exact_json(data, "a generation record")
        body.pop("checksum", None)
        if (found := body.pop("format", None)) != FORMAT:
            raise InputError(f"a generation record has format {found!r}, not {FORMAT!r}")
        made = cls._from_body(body)
        if made.to_json() != data:
            raise InputError("a generation record's checksum does not fit")
        return made

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Generation:
        try:
            record(KINDS)(body)
            before = None if body["before"] is None else cls._from_body(body["before"])
            if any(n > len(body["packets"]) for _, n in body["trust"]):
                raise ValueError("keys begin behind the last packet")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"a generation record is malformed: {error}") from error
        if body["status"] not in (PENDING, CONFIRMED, FAILED):
            raise InputError(f"a generation record has status {body['status']!r}")
        if (before is None) != (body["status"] == CONFIRMED):
            raise InputError(
                "a generation record that is not confirmed must hold the one before it"
            )
        trust = tuple((name, n) for name, n in body["trust"])
        revoked = tuple(Revoked(**one) for one in body["revoked"])
        packets = tuple(body["packets"])
        return cls(
            **{**body, "packets": packets, "trust": trust, "revoked": revoked, "before": before}
        )

"""The keys and packets of a generation record.

Each packet is verified with the keys in force when it was applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..acceptance import (
    NOBODY,
    KeysCase,
    RevocationCase,
    accept_keys,
    accept_revocation,
    require_not_revoked,
)
from ..errors import InputError, NotForThisDevice, naming
from ..formats.bundle import Bundle
from ..formats.control import Revocation, Rotation, read_any, with_revocation
from ..formats.limits import LIMITS
from ..formats.packet import Packet
from ..formats.packet import read as read_packet
from ..formats.signing import Trust
from ..storage import atomic
from .records import Generation
from .store import Store


class Chain:
    """The packets of one store, on top of its bundle."""

    def __init__(self, store: Store, bundle: Bundle) -> None:
        self._store, self._bundle = store, bundle

    def trust(self, record: Generation) -> Trust:
        """The keys that the next packet must be signed with."""
        return self._keys(record)[-1][1]

    def packets(self, record: Generation) -> list[Packet]:
        """The packets of a record, verified.

        Raises:
            InputError: One is damaged.
            TrustError: One was signed by keys that are lost, or was revoked.
        """
        found = [
            read_packet(self._store.packet(digest), trust) for digest, trust in self._signed(record)
        ]
        for packet in found:
            require_not_revoked(packet, record.revoked)
        return found

    def lost_keys(self, record: Generation) -> str:
        """Why it is unknown who may sign: a packet of keys that cannot be read any more.

        Empty if all can.
        """
        for digest, _ in record.trust:
            try:
                self._store.packet(digest)
            except InputError as error:
                return f"no packet is accepted before this is repaired: {error}"
        return ""

    def revoked(self, record: Generation, revocation: Revocation) -> Generation:
        """The record after a revocation. It ends before the first packet that is covered.

        A damaged packet is kept, because nobody knows what it brings. Once it is repaired,
        `packets` says whether it was revoked.

        Raises:
            NotForThisDevice: Another lineage, or a task of the bundle itself.
            NothingToDo: Revoked already.
        """
        manifest, named = self._bundle.manifest, revocation.revoked
        accept_revocation(
            RevocationCase(revocation, manifest.lineage, manifest.revisions, record.revoked)
        )
        after = replace(record, revoked=with_revocation(record.revoked, named))
        for place, (digest, trust) in enumerate(self._signed(record)):
            with contextlib.suppress(InputError):
                packet = read_packet(self._store.packet(digest), trust)
                if any(named.covers(*version) for version in packet.versions):
                    return after.without(len(record.packets) - place)
        return after

    def _keys(self, record: Generation) -> list[tuple[int, Trust]]:
        """The keys of a record, each with the place in its packets from which on they hold."""
        keys = [(0, self._bundle.trust)]
        for digest, begin in record.trust:
            try:
                keys.append((begin, follow_trust(keys[-1][1], [self._store.packet(digest)])))
            except InputError:
                # Damaged. The keys before it were replaced all the same: whoever stole them must
                # not come back in by damage.
                return [*keys, (begin, NOBODY)]
        return keys

    def _signed(self, record: Generation) -> list[tuple[str, Trust]]:
        """Its packets, each with the keys that were in force when it was applied."""
        keys = self._keys(record)
        return [
            (digest, [trust for begin, trust in keys if begin <= i][-1])
            for i, digest in enumerate(record.packets)
        ]


def open_packet(path: Path, bundle: Bundle, trust: Trust) -> Packet | Rotation | Revocation:
    """Read a packet file, verify it against keys, and that it belongs to the bundle's lineage."""
    packet = read_any(atomic.receive(path, LIMITS.packet), trust)
    lineage = getattr(packet, "lineage", bundle.manifest.lineage)
    if lineage != bundle.manifest.lineage:
        raise NotForThisDevice(f"{path} belongs to another lineage than {bundle.path}")
    return packet


def follow_trust(trust: Trust, packets: Sequence[Path | str | bytes]) -> Trust:
    """Return the keys in force after these trust packets, in order.

    Raises:
        InputError: A packet changes no keys, or is damaged.
        TrustError: Signatures are missing, or a version is too old.
        NothingToDo: A packet's keys are in force already.
    """
    for packet in packets:
        one = Path(packet) if isinstance(packet, str) else packet
        with naming(one) if isinstance(one, Path) else contextlib.nullcontext():
            data = atomic.receive(one, LIMITS.packet) if isinstance(one, Path) else one
            rotation = read_any(data, trust)
            if not isinstance(rotation, Rotation):
                raise InputError("this packet changes no keys: name trust packets only")
            accept_keys(KeysCase(rotation, trust))
        trust = rotation.trust
    return trust

"""What a generation record stands for: its keys, and its packets, each verified with the keys in force when it was applied."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from ..errors import InputError, NotForThisDevice, NothingToDo
from ..formats.bundle import Bundle
from ..formats.container import LIMITS
from ..formats.control import Revocation, Rotation, follow_trust, read_any, with_revocation
from ..formats.packet import Packet
from ..formats.packet import read as read_packet
from ..formats.signing import Trust
from ..storage import atomic
from .store import Generation, Store

NOBODY = Trust((), 1, version=0)
"""in force where a packet of keys is damaged: nothing is taken until the same packet has come again"""


class Chain:
    """The packets of one store, on top of its bundle."""

    def __init__(self, store: Store, bundle: Bundle) -> None:
        self._store, self._bundle = store, bundle

    def trust(self, record: Generation) -> Trust:
        """The keys that the next packet must be signed with."""
        return self._keys(record)[-1][1]

    def packets(self, record: Generation) -> list[Packet]:
        """All of them. Raises InputError (damaged), TrustError (of keys that are lost, or revoked)."""
        found = [
            read_packet(self._store.packet(digest), trust) for digest, trust in self._signed(record)
        ]
        for packet in found:
            record.refuse_revoked(packet)
        return found

    def lost_keys(self, record: Generation) -> str:
        """Which packet of keys cannot be read any more, if one cannot."""
        for digest, _ in record.trust:
            try:
                self._store.packet(digest)
            except InputError as error:
                return f"no packet is taken before this is repaired: {error}"
        return ""

    def revoked(self, record: Generation, revocation: Revocation) -> Generation:
        """The record after a revocation: before the first packet that it names, where this device holds one. One that is damaged is
        kept: once it is repaired, `packets` says whether it was revoked.

        Raises NotForThisDevice (another lineage, or the bundle itself), NothingToDo (revoked already).
        """
        manifest, named = self._bundle.manifest, revocation.revoked
        if revocation.lineage != manifest.lineage:
            raise NotForThisDevice(
                f"the revocation of task {named.sequence} is for another lineage ({revocation.lineage[:12]})"
            )
        if any(known.covers(named.sequence, named.revision) for known in record.revoked):
            raise NothingToDo(
                f"task {named.sequence} in revision {named.revision} is revoked already"
            )
        if inside := [
            task
            for task, revision in enumerate(manifest.revisions, 1)
            if named.covers(task, revision)
        ]:
            raise NotForThisDevice(
                f"the revoked task {inside[0]} is part of the bundle itself, which knows task {manifest.task}: "
                "flash this device with another bundle"
            )
        after = replace(record, revoked=with_revocation(record.revoked, named))
        for place, (digest, trust) in enumerate(self._signed(record)):
            with contextlib.suppress(InputError):
                packet = read_packet(self._store.packet(digest), trust)
                if any(named.covers(*version) for version in packet.versions):
                    return after.without(len(record.packets) - place)
        return after

    def _keys(self, record: Generation) -> list[tuple[int, Trust]]:
        """The keys a record goes through: each with the place in its packets from which on they are in force."""
        keys = [(0, self._bundle.trust)]
        for digest, begin in record.trust:
            try:
                keys.append((begin, follow_trust(keys[-1][1], [self._store.packet(digest)])))
            except InputError:  # damaged: the keys before it are replaced all the same
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
    lineage = (
        packet.manifest["lineage"]
        if isinstance(packet, Packet)
        else getattr(packet, "lineage", bundle.manifest.lineage)
    )
    if lineage != bundle.manifest.lineage:
        raise NotForThisDevice(f"{path} belongs to another lineage than {bundle.path}")
    return packet

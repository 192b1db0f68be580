"""How packets come into a device."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ..acceptance import NOBODY, KeysCase, accept_keys, accept_update
from ..errors import NothingToDo, TrustError
from ..formats.canonical import sha256
from ..formats.control import Rotation, read_any
from ..formats.limits import LIMITS
from ..formats.packet import Packet
from ..results import Applied
from ..shortage import noticed
from ..storage import atomic
from .serving import PUBLISHING, Serving


class Intake(Serving):
    """Takes packets: updates, keys and revocations."""

    def apply(self, packet: Path | str, allow_older: bool = False) -> Applied:
        """Verify a packet, build the new weights, run the canary, commit, swap.

        Keys and revocations go the same way.

        The old generation answers until this returns (with IN_PLACE, predictions wait). If this
        raises, the old one stays in force. A damaged store is repaired if this is a packet that it
        should hold.

        Args:
            packet: The packet's file.
            allow_older: Accept a packet again that was rolled back. Otherwise a packet that is not
                newer than the newest ever confirmed is refused.

        Raises:
            InputError: The file is damaged or cannot be read, or the store cannot be written.
            TrustError: Signatures are missing, or the packet is a replay or revoked.
            NotForThisDevice: Another lineage, out of order, or the model has no room.
            HealthError: The canary fails.
            NothingToDo: This device holds the packet already, in whatever position.
            ResourceError: Memory or disk space ran out; try again.
        """
        begin = time.perf_counter()
        data = atomic.receive(Path(packet), LIMITS.packet)
        doing = noticed(f"while a packet was applied, {self._need}")
        with doing, self._store.lock(), self._changing:
            self._follow_store()
            if self._repair(data):
                self._publish(PUBLISHING)
                kind = "trust" if sha256(data) in dict(self._live.record.trust) else "update"
                difference = self._generations.check_canary(self._live)
            else:
                kind, difference = self._accept(data, allow_older)
        elapsed = (time.perf_counter() - begin) * 1000
        return Applied(
            **vars(self.status()),
            kind=kind,
            canary_difference=difference,
            apply_ms=round(elapsed, 1),
        )

    def _accept(self, data: bytes, allow_older: bool) -> tuple[str, float | None]:
        """Put a packet of any kind in force: its kind, and the canary's difference."""
        live = self._live
        # Before the signatures: a packet that is held was verified with the keys of its own time.
        if sha256(data) in (*live.packets, *dict(live.record.trust)):
            raise NothingToDo("this packet is applied already")
        if live.trust is NOBODY:
            raise TrustError(live.damage)
        verified = read_any(data, live.trust)
        if isinstance(verified, Packet):
            return "update", self._update(verified, data, allow_older)
        if isinstance(verified, Rotation):
            return "trust", self._rotate(verified, data)
        after = self._generations.chain.revoked(self._store.current(), verified)
        return "revocation", self._commit(after, self._generations.longest)

    def _update(self, packet: Packet, data: bytes, allow_older: bool) -> float | None:
        live, current = self._live, self._store.current()
        # It follows what is served: packets that are damaged beyond repair are left out from here
        # on.
        record = current.without(len(current.packets) - len(live.packets))
        accept_update(packet, live.standing(self.bundle, record, allow_older))
        record = record.with_packet(sha256(data), packet)  # first: it may be a revocation too many
        self._store.sweep()
        self._store.add_packet(data)
        return self._commit(
            record, lambda generation: self._generations.follow(live, [packet], generation)
        )

    def _rotate(self, rotation: Rotation, data: bytes) -> float | None:
        live = self._live
        accept_keys(KeysCase(rotation, live.trust))
        self._store.sweep()
        # All of the record stays, also what is damaged: other keys do not make it less repairable.
        record = self._store.current()
        keys = (*record.trust, (self._store.add_packet(data), len(record.packets)))
        return self._commit(
            replace(record, trust=keys),
            lambda generation: replace(live, trust=rotation.trust, record=generation.confirmed()),
        )

    def _repair(self, data: bytes) -> bool:
        """Whether these bytes were the intact copy of a damaged packet, and repaired the store."""
        before = self._live
        if not self._generations.may_repair(sha256(data), before):
            return False
        self._store.add_packet(data)
        self._restore(self._store.current())
        return self._generations.has_repaired(before, self._live)

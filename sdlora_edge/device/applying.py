"""How packets come into a device: one rule for one packet and for many.

Keys and revocations come into force one by one, because what follows is judged by them. Updates in
a row are a batch: each is verified and accepted in the state that the one before leads to, and
stored. Then the weights are merged once, one canary is run, and one record is committed. So the
state after a batch is proved. The states in between are not, and they never serve.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..acceptance import NOBODY, KeysCase, accept_keys, accept_update
from ..errors import HealthError, NothingToDo, SdloraError, TrustError, naming
from ..formats.canonical import sha256
from ..formats.control import Revocation, Rotation, read_any
from ..formats.limits import LIMITS
from ..formats.packet import Packet
from ..results import Applied, AppliedAll, AppliedPacket, SkippedPacket
from ..shortage import noticed
from ..state import TaskState
from ..storage import atomic
from .generation import Live
from .records import Generation
from .serving import PUBLISHING, Serving

Told = Callable[[AppliedPacket | SkippedPacket], object]


@dataclass
class Batch:
    """Updates in a row: accepted and stored, but not in force yet.

    Attributes:
        live: The generation that the first one follows.
        base: The record that it follows.
        record: The record after the last one.
        state: The state after the last one.
        revision: Of the last one.
        entries: The updates, and why a file between them is skipped.
    """

    live: Live
    base: Generation
    record: Generation
    state: TaskState
    revision: int
    entries: list[tuple[Path, Packet | NothingToDo]] = field(default_factory=list)

    @property
    def updates(self) -> list[tuple[Path, Packet]]:
        """Its updates, in order."""
        return [(path, one) for path, one in self.entries if isinstance(one, Packet)]

    def before(self, update: int) -> list[tuple[Path, Packet | NothingToDo]]:
        """The entries before an update, which is given by its place among the updates."""
        places = [i for i, (_, one) in enumerate(self.entries) if isinstance(one, Packet)]
        return self.entries[: places[update]] if update < len(places) else self.entries


@dataclass
class Call:
    """One call of `apply_all`: what it has done, and what it is about to do.

    Attributes:
        at: The file that an error is about.
        done: A result for each file, in order.
        batch: The updates that are not in force yet.
    """

    allow_older: bool
    told: Told | None = None
    begin: float = field(default_factory=time.perf_counter)
    at: Path | None = None
    done: list[AppliedPacket | SkippedPacket] = field(default_factory=list)
    batch: Batch | None = None

    @property
    def milliseconds(self) -> float:
        """Since the call."""
        return round(1000 * (time.perf_counter() - self.begin), 1)

    def tell(self, result: AppliedPacket | SkippedPacket) -> None:
        self.done.append(result)
        if self.told is not None:
            self.told(result)

    def skip(self, path: Path, why: NothingToDo) -> None:
        """Tell why a file is skipped, once those before it are in force."""
        if self.batch is None:
            self.tell(SkippedPacket(path, str(why)))
        else:
            self.batch.entries.append((path, why))


class Intake(Serving):
    """Takes packets: updates, keys and revocations."""

    def apply(self, packet: Path | str, allow_older: bool = False) -> Applied:
        """Verify a packet, build the new weights, run the canary, commit, swap.

        Keys and revocations go the same way. For several packets, `apply_all` is faster.

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
        call = Call(allow_older)
        self._take_all(call, [Path(packet)])
        (done,) = call.done
        if isinstance(done, SkippedPacket):
            raise NothingToDo(done.reason)
        return Applied(
            **vars(self.status()),
            kind=done.kind,
            canary_difference=done.canary_difference,
            apply_ms=done.apply_ms,
        )

    def apply_all(
        self, packets: Sequence[Path | str], allow_older: bool = False, told: Told | None = None
    ) -> AppliedAll:
        """Apply packets of any kind in the given order, as `apply` does, but updates in a row as
        one.

        Updates in a row need one merge, one canary (that of the last) and one commit. So only the
        state after them is proved. The states in between are not, and they never serve.

        If a packet is refused, those before it come into force, and the error names its file. If
        the canary fails after a batch, the device goes back by one packet at a time until a canary
        passes. That is the longest healthy beginning, also if a packet fails whose successor
        passes: halving would miss it. Each try costs a merge and a canary. `status()` says where
        the device stands.

        Args:
            packets: The packets' files. Those that this device holds already are skipped.
            allow_older: As for `apply`.
            told: Called for each packet as soon as it is in force, or skipped.

        Raises:
            InputError, TrustError, NotForThisDevice, HealthError, ResourceError: As `apply`. If
                memory ran out, nothing was judged.
        """
        call = Call(allow_older, told)
        try:
            self._take_all(call, [Path(packet) for packet in packets])
        except SdloraError:
            if call.at is None:
                raise
            with naming(call.at):
                raise
        applied = tuple(one for one in call.done if isinstance(one, AppliedPacket))
        return AppliedAll(
            **vars(self.status()),
            applied=applied,
            skipped=tuple(one for one in call.done if isinstance(one, SkippedPacket)),
            canary_difference=applied[-1].canary_difference if applied else None,
            apply_ms=applied[-1].apply_ms if applied else call.milliseconds,
        )

    def _take_all(self, call: Call, paths: Sequence[Path]) -> None:
        doing = noticed(f"while a packet was applied, {self._need}")
        with doing, self._store.lock(), self._changing:
            self._follow_store()
            for path in paths:
                call.at = path
                try:
                    self._take(call, path)
                except NothingToDo as why:
                    call.skip(path, why)
                except SdloraError:
                    self._finish(call)  # an error of this is about an earlier packet: it goes first
                    raise
            self._finish(call)

    def _take(self, call: Call, path: Path) -> None:
        """Put a packet of any kind in force, or an update into the batch."""
        data = atomic.receive(path, LIMITS.packet)
        digest = sha256(data)
        if self._generations.may_repair(digest, self._live):
            self._finish(call)
            call.at = path
            if self._repair(data):
                kind = "trust" if digest in dict(self._live.record.trust) else "update"
                self._publish(PUBLISHING)
                self._tell(call, path, kind, self._generations.check_canary(self._live))
                return
        # Before the signatures: a packet that is held was verified with the keys of its own time.
        held = call.batch.record if call.batch else self._live.record.without(self._lost)
        if digest in held.digests:
            raise NothingToDo("this packet is applied already")
        if self._live.trust is NOBODY:
            raise TrustError(self._live.damage)
        verified = read_any(data, self._live.trust)
        if isinstance(verified, Packet):
            self._join(call, path, verified, data)
            return
        self._finish(call)
        call.at = path
        if isinstance(verified, Rotation):
            self._tell(call, path, "trust", self._rotate(verified, data))
        else:
            self._tell(call, path, "revocation", self._revoke(verified))

    @property
    def _lost(self) -> int:
        """How many packets at the end of the record are damaged beyond repair, and do not serve."""
        return len(self._live.record.packets) - len(self._live.packets)

    def _join(self, call: Call, path: Path, packet: Packet, data: bytes) -> None:
        """Accept an update after those of the batch, and store it."""
        live, batch = self._live, call.batch
        if batch is None:
            # It follows what is served: packets that are damaged beyond repair are left out from
            # here on.
            base = live.record.without(self._lost)
            batch = Batch(live, base, base, live.state, live.revision)
        standing = live.standing(self.bundle, batch.record, call.allow_older)
        state = accept_update(packet, replace(standing, state=batch.state, revision=batch.revision))
        # Before the file is written: it may be a revocation too many.
        record = batch.record.with_packet(packet.digest, packet)
        if call.batch is None:
            self._store.sweep()  # once: later it would remove what this batch has stored
        self._store.add_packet(data)
        batch.record, batch.state, batch.revision = record, state, packet.revision
        batch.entries.append((path, packet))
        call.batch = batch

    def _finish(self, call: Call) -> None:
        """Put the batch in force, or its longest healthy beginning.

        Raises HealthError about the first update that is not in force.
        """
        batch, call.batch = call.batch, None
        if batch is None:
            return
        self._store.keep_names()
        updates, failed = batch.updates, None
        # One at a time, not by halves: a canary that the host computed wrongly fails alone, and the
        # one after it passes.
        for count in range(len(updates), 0, -1):
            packets = [packet for _, packet in updates[:count]]
            try:
                difference = self._commit(
                    _with(batch.base, packets), functools.partial(self._built, batch, packets)
                )
            except HealthError as error:
                call.at, failed = updates[count - 1][0], error
                continue
            self._tell_batch(call, batch.before(count), difference)
            break
        if failed is not None:
            raise failed

    def _built(self, batch: Batch, packets: Sequence[Packet], generation: Generation) -> Live:
        if len(packets) == len(batch.updates):
            return self._generations.become(batch.live, packets, batch.state, generation)
        return self._generations.follow(batch.live, packets, generation)

    def _rotate(self, rotation: Rotation, data: bytes) -> float | None:
        live = self._live
        accept_keys(KeysCase(rotation, live.trust))
        self._store.sweep()
        # All of the record stays, also what is damaged: other keys do not make it less repairable.
        record = live.record
        keys = (*record.trust, (self._store.add_packet(data), len(record.packets)))
        self._store.keep_names()
        return self._commit(
            replace(record, trust=keys),
            lambda generation: replace(live, trust=rotation.trust, record=generation.confirmed()),
        )

    def _revoke(self, revocation: Revocation) -> float | None:
        after = self._generations.chain.revoked(self._live.record, revocation)
        return self._commit(after, self._generations.longest)

    def _repair(self, data: bytes) -> bool:
        """Whether these bytes were the intact copy of a damaged packet, and repaired the store."""
        before = self._live
        self._store.add_packet(data)
        self._store.keep_names()
        self._restore(self._store.current())
        return self._generations.has_repaired(before, self._live)

    def _tell(self, call: Call, path: Path, kind: str, difference: float | None) -> None:
        live, spent = self._live, call.milliseconds
        state = live.state
        call.tell(
            AppliedPacket(path, kind, state.task, state.name, live.counter, difference, spent)
        )

    def _tell_batch(
        self,
        call: Call,
        entries: Sequence[tuple[Path, Packet | NothingToDo]],
        difference: float | None,
    ) -> None:
        counter, spent = self._live.counter, call.milliseconds
        for path, one in entries:
            if isinstance(one, NothingToDo):
                call.tell(SkippedPacket(path, str(one)))
            else:
                task, name = one.sequence, one.update.name
                call.tell(AppliedPacket(path, "update", task, name, counter, difference, spent))


def _with(record: Generation, packets: Sequence[Packet]) -> Generation:
    """The record with these packets more."""
    for packet in packets:
        record = record.with_packet(packet.digest, packet)
    return record

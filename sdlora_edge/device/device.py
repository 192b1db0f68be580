"""The device. Its threads share one reference, `_live`: an update swaps it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..acceptance import NOBODY, KeysCase, accept_keys, accept_update
from ..errors import HealthError, InputError, NothingToDo, ResourceError, TrustError, UsageError
from ..formats.bundle import MANIFEST, Bundle, open_bundle
from ..formats.canonical import sha256
from ..formats.control import Rotation, read_any
from ..formats.limits import LIMITS
from ..formats.packet import Packet
from ..formats.signing import Trust
from ..inputs.image import Preprocessing
from ..results import Applied, Status, Verification
from ..shortage import noticed, require_memory
from ..state import TaskState
from ..storage import atomic
from . import trial
from .answers import Predictor
from .engines import open_engine
from .gate import Gate, let_go
from .generation import Generations, Live
from .records import Generation
from .store import Store
from .verify import verified

log = logging.getLogger("sdlora_edge")
DOUBLE_BUFFER, IN_PLACE = "double_buffer", "in_place"
"""how new weights replace the old ones: built beside them, or after the old ones have been given
up"""
ENGINE = 80 << 20
"""bytes of address space that an engine takes beside its model: with less, ONNX Runtime may end the
process"""
PUBLISHING = 10.0
"""seconds that an update waits for another process to publish"""


class Device(Predictor):
    """A device's model. Any number of threads may call `predict` while one thread calls `apply`."""

    def __init__(
        self,
        store: Store,
        bundle: Bundle,
        threads: int = 0,
        unproved: bool = False,
        swap: str = DOUBLE_BUFFER,
    ) -> None:
        if swap not in (DOUBLE_BUFFER, IN_PLACE):
            raise UsageError(f"swap {swap!r} is unknown: choose {DOUBLE_BUFFER} or {IN_PLACE}")
        self.bundle = bundle
        self._store = store
        self._changing = threading.Lock()  # held by the one thread that may set `_live`
        self._gate: Gate | None = None
        self._prepare = Preprocessing.from_manifest(bundle.manifest.preprocessing)
        self._need = f"which needs about {(ENGINE + 2 * bundle.model_bytes) >> 20} MB"
        record = store.current()
        if record.bundle != bundle.id:
            raise InputError(
                f"{bundle.path / MANIFEST} is not the one this store was made with: "
                "flash the device again"
            )
        with noticed(f"while the model was loaded, {self._need}"):
            require_memory(ENGINE + bundle.model_bytes)
            self._engine = open_engine(bundle, threads, store.workspace, unproved)
            self._generations = Generations(store, bundle, self._engine)
            self._live = self._generations.longest(record)
        if swap == IN_PLACE:
            self._gate, self._generations.replaced = Gate(), self._live
        for line in self.status().damage:
            log.warning("%s", line)

    @classmethod
    def init(
        cls, bundle: Path | str, store: Path | str, unproved: bool = False, group: str | None = None
    ) -> Device:
        """Make a store from a bundle, if this device computes what the host computed.

        Args:
            bundle: The bundle's folder.
            store: The new store; it belongs to this user alone.
            unproved: As for `open`.
            group: Name or number of a group whose members may read the store, and so predict.

        Raises:
            InputError: The bundle is damaged.
            UsageError: The store exists, or the group does not.
            HealthError: The canary fails, or the model crashes.
        """
        opened = open_bundle(Path(bundle))
        Store.create(
            Path(store),
            opened,
            lambda new: cls.open(trial.tried(new, unproved, open_store), unproved=unproved),
            group,
        )
        return cls.open(store, unproved=unproved)

    @classmethod
    @noticed("while the store was opened")
    def open(
        cls, store: Path | str, threads: int = 0, unproved: bool = False, swap: str = DOUBLE_BUFFER
    ) -> Device:
        """Open a store in the generation in force. Verifies every file and runs the canary.

        If a packet is damaged or unreadable, or the canary fails, the longest intact and healthy
        prefix of the generation is served instead, and `status().damage` says so. What has been
        confirmed stays confirmed: apply the damaged packet again to repair the store.

        Opening writes nothing and takes no lock, so everyone who may read the store can open it.
        One exception: an ExecuTorch pair that was not published yet is published, if possible.

        Args:
            store: The store's folder.
            threads: Threads of the engine; 0 leaves the number to the engine.
            unproved: The engine's runtime is not installed (`engines.Engine.runs`). Updates are
                verified, merged and published; the program that loads them must try the canary.
            swap: DOUBLE_BUFFER builds an update beside the weights that serve, and no prediction
                ever waits. IN_PLACE frees those first, for a device without memory for both:
                predictions wait until the new weights are proved, or the old ones are back.

        Raises:
            InputError, TrustError, HealthError: Nothing can be served.
            ResourceError: Memory ran out.
        """
        opened = Store(Path(store))
        device = cls(opened, open_bundle(opened.path / "bundle"), threads, unproved, swap)
        device._publish()
        return device

    @staticmethod
    def verify(store: Path | str, unproved: bool = False) -> Verification:
        """Compare every byte of a store with what it should be, and write nothing."""
        return verified(
            Store(Path(store)),
            lambda opened: Device(opened, open_bundle(opened.path / "bundle"), unproved=unproved),
        )

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

    def refresh(self) -> bool:
        """Take over what another process has committed to this store. True if there was anything.

        If there was nothing, it reads only two small files. Otherwise it builds new weights as
        `apply` does: call it between images, or from a thread of its own. If it raises InputError
        or HealthError, the previous generation stays in force here.
        """
        if not self._changing.acquire(blocking=False):  # another thread is doing it
            return False
        try:
            before = self._live
            with noticed(f"while an update was taken over, {self._need}"):
                self._follow_store()
            return self._live is not before
        finally:
            self._changing.release()

    @property
    def trust(self) -> Trust:
        """The keys that must sign the next packet."""
        return self._live.trust

    def rollback(self) -> Status:
        """Go back by one packet for good. If packets are damaged, keep those that are intact.

        Raises:
            NothingToDo: The device is in the bundle's own state.
            HealthError: The canary fails.
        """
        doing = noticed(f"while the generation before was loaded, {self._need}")
        with doing, self._store.lock(), self._changing:
            self._follow_store()
            record = self._store.current()
            if not record.packets:
                raise NothingToDo(
                    "nothing to roll back: this device is in the state it was flashed with"
                )
            if self._store.damaged(record.digests):
                # Damaged since this program read them: it cannot go back to them either.
                self._restore(record)
            lost = len(record.packets) - len(self._live.packets)
            self._commit(record.without(lost or 1), self._generations.build)
        return self.status()

    def current(self) -> tuple[TaskState, dict[str, np.ndarray]]:
        """The state in force, and its merged weights and head, float32, computed on each call."""
        live = self._live
        return live.state, dict(self.bundle.merged(live.state, live.factors))

    def _commit(self, record: Generation, build: Callable[[Generation], Live]) -> float | None:
        """Put a record in force if its canary passes: the largest difference.

        The order is what makes a power cut harmless. The new generation is complete and proved
        before `replacing` confirms its record; only then do this process (`_live`) and others
        (`_publish`) switch to it.
        """
        self._engine.require_publishing()
        with self._swapping():
            new = None
            try:
                with self._store.replacing(record) as generation:
                    new = build(generation)
                    difference = self._generations.check_canary(new)
            except BaseException:
                if new is not None:
                    new.loaded = None  # its memory may be needed, and the error still refers to it
                raise
            self._live = new
        self._publish(PUBLISHING)
        return difference

    @contextlib.contextmanager
    def _serving(self) -> Iterator[Live]:
        """The generation to answer with. Raises HealthError if there is none."""
        with self._gate.inside() if self._gate else contextlib.nullcontext():
            live = self._live
            if live.loaded is None:
                raise HealthError(
                    "no model is loaded: the update and the previous generation both failed "
                    "to load; call refresh()"
                )
            yield live

    @contextlib.contextmanager
    def _swapping(self) -> Iterator[None]:
        """Around whatever sets `_live`.

        With IN_PLACE, predictions wait; if an update fails, the old weights are loaded again.
        """
        if self._gate is None:
            yield
            return
        with self._gate.closed():
            try:
                yield
                self._generations.replaced = self._live
            except BaseException as error:
                let_go(error)
                if (live := self._live).loaded is None:
                    live.loaded = self._generations.load(live.state, live.factors)
                raise

    def status(self) -> Status:
        """Where this device stands. A disk that does not answer is part of the damage."""
        size: dict[str, int] = {}
        damage: list[str] = []
        try:
            size = self._store.size()
            damage += self._store.damage()
        except InputError as error:
            damage.append(str(error))
        return self._live.status(self.bundle, size, damage)

    def _publish(self, wait: float = 0.0) -> None:
        """Let the engine tell other programs, unless they know already or another process went on.

        The generation is in force without it. If publishing fails, it is done again when the store
        is next opened.
        """
        live = self._live
        if self._engine.published(live.loaded, live.state):
            return
        try:
            with self._store.lock("publish.lock", wait):
                if self._serves(self._store.current()):
                    self._engine.publish(live.loaded, live.state)
        except (InputError, ResourceError, UsageError) as error:  # of the disk
            log.warning("generation %d is in force, but not published: %s", live.counter, error)

    def _follow_store(self) -> None:
        """Serve the generation in force, if it is another one or if damage has been repaired."""
        record, live = self._store.current(), self._live
        if record.counter < live.record.counter:
            # Both newest copies are gone. To go on in silence would commit on top of a past that
            # this process knows is over.
            raise InputError(
                "the store has lost its newest generation record: "
                "open it again to go on from the one before it"
            )
        if not self._serves(record) or live.loaded is None:
            self._restore(record)

    def _serves(self, record: Generation) -> bool:
        """Whether nothing was committed or repaired since.

        Compares the whole record, not its counter: after a record was lost, the next one gets the
        same number again.
        """
        live = self._live
        return record == live.record and self._store.damaged(live.damaged) == live.damaged

    def _restore(self, record: Generation) -> None:
        with self._swapping():
            self._live = self._generations.longest(record)

    def _repair(self, data: bytes) -> bool:
        """Whether these bytes were the intact copy of a damaged packet, and repaired the store."""
        before = self._live
        if not self._generations.may_repair(sha256(data), before):
            return False
        self._store.add_packet(data)
        self._restore(self._store.current())
        return self._generations.has_repaired(before, self._live)


def open_store(store: str) -> None:
    """Load the model and run its canary: what the child process of `trial` does."""
    print(trial.BEGUN, flush=True)
    Device(Store(Path(store)), open_bundle(Path(store) / "bundle"))

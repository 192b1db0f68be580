"""The device: opens a store, predicts, applies packets, rolls back. One reference is swapped; nothing else is shared."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..acceptance import NOBODY, KeysCase, Standing, accept_keys, accept_update
from ..errors import (
    UNWRITTEN,
    HealthError,
    InputError,
    NothingToDo,
    ResourceError,
    TrustError,
    UsageError,
)
from ..formats.bundle import MANIFEST, Bundle, open_bundle
from ..formats.canonical import sha256
from ..formats.container import LIMITS
from ..formats.control import Rotation, read_any
from ..formats.encoding import Factors
from ..formats.packet import Packet
from ..formats.signing import Trust
from ..inputs import canary
from ..inputs.image import MAX_PIXELS, ImageLike, Preprocessing
from ..shortage import noticed, require_memory
from ..state import TaskState
from ..storage import atomic
from . import answers, trial
from .answers import Prediction, Source
from .chain import Chain
from .engines import open_engine
from .gate import Gate, let_go, one_blas_thread
from .generation import Live
from .store import Generation, Store

log = logging.getLogger("sdlora_edge")
DOUBLE_BUFFER, IN_PLACE = "double_buffer", "in_place"
"""how an update takes the place of the weights before it: beside them, or after they have been given up"""
ENGINE = 80 << 20
"""bytes of address space that an engine takes beside its model: where it gets less, ONNX Runtime may end the process"""
PUBLISHING = 10.0
"""seconds that an update waits for another process to publish"""


class Device:
    """A device's model. `predict` may be called from any number of threads while one thread calls `apply`."""

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
        self._chain = Chain(store, bundle)
        self._prepare = Preprocessing.from_manifest(bundle.manifest.preprocessing)
        self._need = f"which needs about {(ENGINE + 2 * bundle.model_bytes) >> 20} MB"
        record = store.current()
        if record.bundle != bundle.id:
            raise InputError(
                f"{bundle.path / MANIFEST} is not the one this store was made with: flash the device again"
            )
        with noticed(f"while the model was loaded, {self._need}"):
            require_memory(ENGINE + bundle.model_bytes)
            self._engine = open_engine(bundle, threads, store.workspace, unproved)
            self._live = self._longest(record)
        self._gate = Gate() if swap == IN_PLACE else None
        for damage in self.status()["damage"]:
            log.warning("%s", damage)

    @classmethod
    def init(
        cls, bundle: Path | str, store: Path | str, unproved: bool = False, group: str | None = None
    ) -> Device:
        """Make a store from a bundle, once this device has proved that it computes what the host computed.

        The store belongs to this user alone; group: whose members may read it, so that they can predict. Raises InputError for a
        damaged bundle, UsageError if the store exists or the group does not, HealthError if the canary fails or the model crashes.
        """
        opened = open_bundle(Path(bundle))
        Store.create(
            Path(store),
            opened,
            lambda new: cls.open(trial.tried(new, unproved), unproved=unproved),
            group,
        )
        return cls.open(store, unproved=unproved)

    @classmethod
    @noticed("while the store was opened")
    def open(
        cls, store: Path | str, threads: int = 0, unproved: bool = False, swap: str = DOUBLE_BUFFER
    ) -> Device:
        """Open a store in the generation in force: every file verified, the canary run. Raises InputError, TrustError, HealthError.

        Where a packet is damaged or cannot be read, or the canary fails, the longest beginning of the generation that is whole
        and healthy is served instead, and `status()["damage"]` says so; nothing is written, and what has been confirmed stays
        confirmed. Applying the damaged packet again repairs the store. Nothing is written and no lock is taken, so whoever may read
        the store can open it; only an ExecuTorch pair that was not published yet is published, if that is possible.

        threads: of the engine; 0 leaves it to the engine. unproved: the engine's runtime is not here (`engines.Engine.runs`):
        updates are verified, merged and published, and it is the program that loads them which has to try the canary.
        swap: DOUBLE_BUFFER builds an update beside the weights that serve, and no predictor ever waits; IN_PLACE gives those up
        first, for a device without the memory for both: predictors wait until the new ones are proved, or the old ones back.
        """
        opened = Store(Path(store))
        device = cls(opened, open_bundle(opened.path / "bundle"), threads, unproved, swap)
        device._publish()
        return device

    def predict(
        self,
        images: Iterable[ImageLike],
        top: int = 1,
        batch_size: int = answers.BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Prediction]:
        """The `top` best classes of each image. Raises InputError naming the first that cannot be read, or has too many pixels."""
        found = []
        for answer in self.predict_each(images, top, batch_size, max_pixels):
            if not isinstance(answer, Prediction):
                raise answer
            found.append(answer)
        return found

    def predict_each(
        self,
        images: Iterable[Source],
        top: int = 1,
        batch_size: int = answers.BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Prediction | InputError | ResourceError]:
        """As `predict`, one answer after the other, and for an image that cannot be read its error in place of an answer.

        Every batch is answered by one generation. An update may come between two batches.
        """
        for batch in answers.prepared(images, self._prepare, batch_size, max_pixels):
            readable = [image for image in batch if isinstance(image, np.ndarray)]
            found = self._answered(readable, top) if readable else iter(())
            for image in batch:
                yield next(found) if isinstance(image, np.ndarray) else image

    def _answered(self, pixels: Sequence[np.ndarray], top: int) -> Iterator[Prediction]:
        with noticed(f"while {len(pixels)} images were answered together"), self._serving() as live:
            logits = self._engine.run(live.loaded, self._prepare.normalise(np.stack(pixels)))
        return answers.best(logits, live.state.classes, live.counter, top)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """float32 (N, 3, size, size), preprocessed, to logits float32 (N, live classes)."""
        with self._serving() as live:
            return self._engine.run(live.loaded, inputs)[:, live.state.live]

    def apply(self, packet: Path | str, allow_older: bool = False) -> dict[str, Any]:
        """Verify a packet, build the new weights beside the old, run the canary, commit, swap. Keys and revocations go the same way.

        Until this returns the old generation answers (IN_PLACE: predictors wait); where it raises, the old one stays in force:
        InputError or LimitError (unreadable), TrustError (signature, replay, revoked), NotForThisDevice (lineage, order,
        capacity), HealthError (canary), NothingToDo (this device holds it, in whatever place), ResourceError (memory or disk
        space ran out: try again). After a rollback, packets not newer than the newest ever
        confirmed are refused unless `allow_older`. Returns what `status` does, with the packet's kind, the canary's largest
        difference and the milliseconds it took.
        """
        begin = time.perf_counter()
        data = atomic.receive(Path(packet), LIMITS.packet)
        with (
            noticed(f"while a packet was applied, {self._need}"),
            self._store.lock(),
            self._changing,
        ):
            self._follow_store()
            if self._repair(data):
                self._publish(PUBLISHING)
                kind = "trust" if sha256(data) in dict(self._live.record.trust) else "update"
                return self._applied(kind, self._check_canary(self._live), begin)
            live, record = self._live, self._whole_record()
            if sha256(data) in (*live.packets, *dict(live.record.trust)):  # whoever signs now
                raise NothingToDo("this packet is applied already")
            if live.trust is NOBODY:
                raise TrustError(live.damage)
            verified = read_any(data, live.trust)
            if isinstance(verified, Packet):
                kind, manifest = "update", self.bundle.manifest
                standing = Standing(
                    manifest.lineage,
                    manifest.projections,
                    live.state,
                    live.revision,
                    (record.revision, record.highest),
                    record.revoked,
                    manifest.capacity,
                    allow_older,
                )
                accept_update(verified, standing)
                self._store.sweep()
                record = record.with_packet(self._store.add_packet(data), verified)
                difference = self._commit(
                    record, lambda generation: self._follow(live, [verified], generation)
                )
            elif isinstance(verified, Rotation):
                kind, keys = "trust", verified.trust
                accept_keys(KeysCase(verified, live.trust))
                self._store.sweep()
                record = (
                    self._store.current()
                )  # with what is damaged: other keys do not make it any less repairable
                record = replace(
                    record,
                    trust=(*record.trust, (self._store.add_packet(data), len(record.packets))),
                )
                difference = self._commit(
                    record,
                    lambda generation: replace(live, trust=keys, record=generation.confirmed()),
                )
            else:
                kind = "revocation"
                difference = self._commit(
                    self._chain.revoked(self._store.current(), verified), self._longest
                )
        return self._applied(kind, difference, begin)

    def _applied(self, kind: str, difference: float | None, begin: float) -> dict[str, Any]:
        elapsed = (time.perf_counter() - begin) * 1000
        return {
            **self.status(),
            "kind": kind,
            "canary_difference": difference,
            "apply_ms": round(elapsed, 1),
        }

    def refresh(self) -> bool:
        """Take over what another process has committed to this store since: whether there was anything.

        Reads two small files where there was nothing. Else new weights are built beside the old ones, as in `apply`: call it
        between images, or every second from a thread of its own, so that `predict` goes on meanwhile. Where it raises
        InputError or HealthError, the generation before stays in force here.
        """
        if not self._changing.acquire(blocking=False):  # another thread is at it
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
        """The keys that a packet must be signed with now."""
        return self._live.trust

    def rollback(self) -> dict[str, Any]:
        """Go back by one packet, for good; from a damaged generation, to what is left of it.

        Raises NothingToDo in the bundle's own state, HealthError (canary).
        """
        with (
            noticed(f"while the generation before was loaded, {self._need}"),
            self._store.lock(),
            self._changing,
        ):
            self._follow_store()
            if not self._store.current().packets:
                raise NothingToDo(
                    "nothing to roll back: this device is in the state it was flashed with"
                )
            record = self._store.current()
            if self._store.damaged(
                record.digests
            ):  # since they were read: this program cannot go back to them either
                self._restore(record)
            lost = len(record.packets) - len(self._live.packets)
            self._commit(record.without(lost or 1), self._build)
        return self.status()

    def current(self) -> tuple[TaskState, dict[str, np.ndarray]]:
        """The state in force, and its merged weights and head, float32, by the names of the model's own: computed anew."""
        live = self._live
        return live.state, dict(self.bundle.merged(live.state, live.factors))

    def _commit(self, record: Generation, build: Callable[[Generation], Live]) -> float | None:
        """Put a record in force, once its canary is as it should be: returns the largest difference."""
        self._engine.require_publishing()
        with self._swapping():
            new = None
            try:
                with self._store.replacing(record) as generation:
                    new = build(generation)
                    difference = self._check_canary(new)
            except BaseException:
                if new is not None:
                    new.loaded = None  # its memory may be needed, and the error still refers to it
                raise
            self._live = new
        self._publish(PUBLISHING)
        return difference

    @contextlib.contextmanager
    def _serving(self) -> Iterator[Live]:
        """The generation to answer with. Raises HealthError where there is none."""
        with self._gate.inside() if self._gate else contextlib.nullcontext():
            live = self._live
            if live.loaded is None:
                raise HealthError(
                    "no model is loaded: the update and the previous generation both failed to load; call refresh()"
                )
            yield live

    @contextlib.contextmanager
    def _swapping(self) -> Iterator[None]:
        """Around whatever sets `_live`. In place, predictors wait, and get back what was given up for one that is not served."""
        if self._gate is None:
            yield
            return
        with self._gate.closed():
            try:
                yield
            except BaseException as error:
                let_go(error)
                if (live := self._live).loaded is None:
                    live.loaded = self._load(live.state, live.factors)
                raise

    def status(self) -> dict[str, Any]:
        """Where this device stands, as plain values. A disk that does not answer is part of the damage."""
        live, manifest = self._live, self.bundle.manifest
        record, size, damage = live.record, {}, [live.damage] if live.damage else []
        try:
            size = self._store.size()
            damage += self._store.damage()
        except InputError as error:
            damage.append(str(error))
        return {
            "generation": live.counter,
            "task": live.state.task,
            "task_name": live.state.name,
            "revision": live.revision,
            "highest_task": record.highest,
            "revoked": [[r.sequence, r.revision] for r in record.revoked],
            "trust_version": live.trust.version,
            "state": live.state.digest,
            "lineage": manifest.lineage,
            "bundle": self.bundle.id,
            "model": manifest.model,
            "target": manifest.target,
            "precision": manifest.precision,
            "classes": list(live.state.names),
            "packets": len(live.packets),
            "store_bytes": size,
            "damage": damage,
        }

    def _publish(self, wait: float = 0.0) -> None:
        """Let the engine tell programs beside this one, unless they know, or another process has gone on meanwhile. What fails is
        done again when the store is next opened: the generation is in force without it."""
        if self._engine.published(self._live.loaded):
            return
        try:
            with self._store.lock("publish.lock", wait):
                if self._serves(self._store.current()):
                    self._engine.publish(self._live.loaded)
        except (
            InputError,
            ResourceError,
            UsageError,
        ) as error:  # of the disk: what is in force stays in force
            log.warning(
                "generation %d is in force here, but not published: %s", self._live.counter, error
            )

    def _follow_store(self) -> None:
        """Serve the generation in force, where it is another one than here, or what was damaged has been repaired."""
        record, live = self._store.current(), self._live
        if record.counter < live.record.counter:
            raise InputError(
                "the store has lost its newest generation record: open it again to go on from the one before it"
            )
        if not self._serves(record) or live.loaded is None:
            self._restore(record)

    def _serves(self, record: Generation) -> bool:
        """Whether nothing was committed or repaired since. By the whole record: where one was lost, its number is given again."""
        live = self._live
        return record == live.record and self._store.damaged(live.damaged) == live.damaged

    def _restore(self, record: Generation) -> None:
        with self._swapping():
            self._live = self._longest(record)

    def _whole_record(self) -> Generation:
        """The record in force, without the packets that cannot be served."""
        record = self._store.current()
        return record.without(len(record.packets) - len(self._live.packets))

    def _longest(self, record: Generation) -> Live:
        """The generation of a record, or the longest beginning of it that is whole and healthy, with the keys of all of it."""
        served, damage = record, ""
        while True:
            live: Live | None = None  # one whose canary failed is not kept beside the next
            try:
                live = self._build(served)
                self._check_canary(live)
            except UNWRITTEN:
                raise  # of an engine that cannot write, or has no memory: nothing is damaged
            except (InputError, TrustError, HealthError) as error:
                if (now := self._store.current()).counter > record.counter:
                    record = served = (
                        now  # another process went on, and swept what this one was reading
                    )
                    continue
                if not served.packets:
                    raise
                damaged = self._store.damaged(served.packets[:-1])
                lost = len(record.packets) - (
                    served.packets.index(damaged[0]) if damaged else len(served.packets) - 1
                )
                served, damage = record.without(lost), damage or str(error)
            else:
                if damage:
                    damage = f"generation {record.counter} is served up to task {live.state.task} only: {damage}"
                damage = live.damage or damage
                damaged = self._store.damaged(record.digests) if damage else ()
                return replace(live, record=record.confirmed(), damage=damage, damaged=damaged)

    def _repair(self, data: bytes) -> bool:
        """Whether these are the bytes of a damaged packet that the generation in force names, and with them more of it is served,
        or as much as before where the damage came while it was being served."""
        record, before, digest = self._store.current(), self._live, sha256(data)
        if digest not in record.digests or not (before.damage or self._store.damaged((digest,))):
            return False
        self._store.add_packet(data)
        self._restore(record)
        return not before.damage or (self._live.packets, self._live.trust) != (
            before.packets,
            before.trust,
        )

    def _build(self, record: Generation) -> Live:
        """The generation of a record, made from the bundle; where its keys are damaged, that is its damage."""
        manifest = self.bundle.manifest
        seed, logits = manifest.canary.seed, self.bundle.canary_logits
        keys = self._chain.trust(record)
        flashed = Live(record, (), self.bundle.state, (), seed, logits, keys, manifest.revision)
        damage = self._chain.lost_keys(record)
        damaged = self._store.damaged(record.digests) if damage else ()
        return replace(
            self._follow(flashed, self._chain.packets(record), record),
            damage=damage,
            damaged=damaged,
        )

    def _follow(self, live: Live, packets: Sequence[Packet], record: Generation) -> Live:
        """The generation of a record, made from another one and the packets it has more."""
        manifest, state, factors = self.bundle.manifest, live.state, list(live.factors)
        seed, logits, revision = live.canary_seed, live.canary_logits, live.revision
        for packet in packets:
            standing = Standing(manifest.lineage, manifest.projections, state, revision)
            state = accept_update(packet, standing)
            factors += [dict(update.factors) for update in packet.updates]
            seed, logits, revision = packet.canary_seed, packet.canary_logits, packet.revision
        if self._gate:
            self._live.loaded = None  # its memory is needed now
        loaded = self._load(state, factors)
        return Live(
            record.confirmed(),
            record.packets,
            state,
            tuple(factors),
            seed,
            logits,
            live.trust,
            revision,
            loaded,
        )

    def _load(self, state: TaskState, factors: Sequence[Mapping[str, Factors]]) -> Any:
        with (
            one_blas_thread() if any(factors) else contextlib.nullcontext()
        ):  # without, there is nothing to multiply
            return self._engine.load(self.bundle.merged(state, factors))

    def _check_canary(self, live: Live) -> float | None:
        """The largest difference; None where the engine runs nothing. Raises HealthError."""
        if not self._engine.runs:
            return None
        inputs = canary.inputs(live.canary_seed, self._prepare, len(live.canary_logits))
        logits = self._engine.run(live.loaded, inputs)[:, live.state.live]
        return canary.check(
            logits,
            live.canary_logits,
            self.bundle.manifest.canary.tolerance,
            live.state.task,
            self._engine.advice,
        )

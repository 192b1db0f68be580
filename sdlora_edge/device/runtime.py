"""The device: opens a store, predicts, applies packets, rolls back. One reference is swapped; nothing else is shared."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..bundle import HEAD_BIAS, HEAD_WEIGHT, MANIFEST, Bundle, open_bundle
from ..canonical import sha256
from ..container import LIMITS
from ..errors import HealthError, InputError, NotForThisDevice, NothingToDo, StorageError, TrustError
from ..orders import Recall, Rotation, follow_trust, read_any, with_recall
from ..packet import Packet
from ..packet import read as read_packet
from ..signing import Trust
from ..state import Factors, TaskState, extended, merge
from . import canary
from .engines import open_engine
from .preprocessing import Picture, Preprocessing
from .store import Generation, Store

log = logging.getLogger("sdlora_edge")
NOBODY = Trust((), 1, version=0)
"""in force where a packet of keys is damaged: nothing is taken until the same packet has come again"""


@dataclass(frozen=True)
class Prediction:
    """The best classes of one picture, best first, as (class name, probability); `generation` says which model answered."""

    top: tuple[tuple[str, float], ...]
    generation: int


@dataclass(frozen=True, eq=False)
class _Live:
    """Everything one generation needs to answer. Never changed: an update makes another one and swaps the reference."""

    counter: int
    packets: tuple[str, ...]
    state: TaskState
    factors: tuple[dict[str, Factors], ...]
    canary_seed: int
    canary_logits: np.ndarray
    trust: Trust
    revision: int
    loaded: Any
    record: Generation
    """in force when it was made"""
    lost: tuple[str, ...] = ()
    """its packets that could not be read then, where there is damage"""
    damage: str = ""
    """why these are fewer packets than the generation in force names, or who may sign is not known"""


class Device:
    """A device's model. `predict` may be called from any number of threads while one thread calls `apply`."""

    def __init__(self, store: Store, bundle: Bundle, threads: int = 0, unproved: bool = False) -> None:
        self.bundle = bundle
        self._store = store
        self._changing = threading.Lock()  # held by the one thread that may set `_live`
        self._prepare = Preprocessing.from_manifest(bundle.manifest.preprocessing)
        record = store.current()
        if record.bundle != bundle.id:
            raise InputError(f"{bundle.path / MANIFEST} is not the one this store was made with: flash the device again")
        self._engine = open_engine(bundle, threads, store.path / "engine", unproved)
        self._live = self._restore(record)
        for damage in self.status()["damage"]:
            log.warning("%s", damage)
        self._publish()

    @classmethod
    def init(cls, bundle: Path | str, store: Path | str, unproved: bool = False) -> Device:
        """Make a store from a bundle, once this device has proved that it computes what the host computed.

        Raises InputError for a damaged bundle, UsageError where the store exists, HealthError where the canary fails.
        """
        Store.create(Path(store), open_bundle(Path(bundle)), lambda folder: cls.open(folder, unproved=unproved))
        return cls.open(store, unproved=unproved)

    @classmethod
    def open(cls, store: Path | str, threads: int = 0, unproved: bool = False) -> Device:
        """Open a store in the generation in force: every file verified, the canary run. Raises InputError, TrustError, HealthError.

        Where a packet is damaged or cannot be read, or the canary fails, the longest beginning of the generation that is whole
        and healthy is served instead, and `status()["damage"]` says so; nothing is written, and what has been confirmed stays
        confirmed. Applying the damaged packet again mends the store.

        threads: of the engine; 0 leaves it to the engine. unproved: the engine's runtime is not here (`engines.Engine.runs`):
        updates are verified, merged and published, and it is the program that loads them which has to try the canary.
        """
        opened = Store(Path(store))
        return cls(opened, open_bundle(opened.path / "bundle"), threads, unproved)

    def predict(self, pictures: Iterable[Picture], top: int = 1, batch_size: int = 32) -> list[Prediction]:
        """The `top` best classes of each picture. Raises InputError naming a picture that cannot be read."""
        live = self._live
        prepare = self._prepare
        pixels = [prepare.pixels(picture) for picture in pictures]
        found: list[Prediction] = []
        for start in range(0, len(pixels), batch_size):
            logits = self._engine.run(live.loaded, prepare.normalise(np.stack(pixels[start : start + batch_size])))
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
            for row in scores:
                best = np.argsort(-row, kind="stable")[:top]
                found.append(Prediction(tuple((live.state.classes[i], float(row[i])) for i in best), live.counter))
        return found

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """float32 (N, 3, size, size), preprocessed, to logits float32 (N, classes)."""
        return self._engine.run(self._live.loaded, inputs)

    def apply(self, packet: Path | str, allow_older: bool = False) -> dict[str, Any]:
        """Verify a packet, build the new weights beside the old, run the canary, commit, swap. Keys and recalls go the same way.

        Until this returns the old generation answers; where it raises, the old one stays in force: InputError or LimitError
        (unreadable), TrustError (signature, replay, recalled), NotForThisDevice (lineage, order, capacity), HealthError (canary),
        NothingToDo (applied already). After a rollback, packets not newer than the newest ever confirmed are refused
        unless `allow_older`. Returns what `status` does, with the packet's kind, the canary's largest difference and the
        milliseconds it took.
        """
        begin = time.perf_counter()
        data = files.receive(Path(packet), LIMITS.packet)
        with self._store.lock(), self._changing:
            self._follow_store()
            if self._mend(data):
                self._publish()
                kind = "trust" if sha256(data) in dict(self._store.current().trust) else "update"
                return self._applied(kind, self._check_canary(self._live), begin)
            live, record = self._live, self._whole_record()
            if live.trust is NOBODY:
                raise TrustError(live.damage)
            verified = read_any(data, live.trust)
            if isinstance(verified, Packet):
                kind, manifest = "update", self.bundle.manifest
                verified.check(live.state, manifest.lineage, manifest.projections, live.revision)
                record.admits(verified, allow_older)
                self.bundle.require_room(verified.canary_logits.shape[1])
                self._store.sweep()
                record = record.with_packet(self._store.add_packet(data), verified)
                difference = self._commit(record, lambda generation: self._follow(live, [verified], generation))
            elif isinstance(verified, Rotation):
                kind, keys = "trust", verified.trust
                verified.check(live.trust)
                self._store.sweep()
                record = self._store.current()  # with what is damaged: other keys do not make it any less mendable
                record = replace(record, trust=(*record.trust, (self._store.add_packet(data), len(record.packets))))
                difference = self._commit(record, lambda generation: self._rekeyed(live, keys, generation))
            else:
                kind = "recall"
                difference = self._commit(self._recalling(record, verified), self._build)
        return self._applied(kind, difference, begin)

    def _applied(self, kind: str, difference: float | None, begin: float) -> dict[str, Any]:
        elapsed = (time.perf_counter() - begin) * 1000
        return {**self.status(), "kind": kind, "canary_difference": difference, "apply_ms": round(elapsed, 1)}

    def refresh(self) -> bool:
        """Take over what another process has committed to this store since: whether there was anything.

        Reads two small files where there was nothing. Else new weights are built beside the old ones, as in `apply`: call it
        between pictures, or every second from a thread of its own, so that `predict` goes on meanwhile. Where it raises
        InputError or HealthError, the generation before stays in force here.
        """
        if not self._changing.acquire(blocking=False):  # another thread is at it
            return False
        try:
            before = self._live
            self._follow_store()
            return (self._live.record, self._live.packets, self._live.trust) != (before.record, before.packets, before.trust)
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
        with self._store.lock(), self._changing:
            self._follow_store()
            if not self._store.current().packets:
                raise NothingToDo("nothing to roll back: this device is in the state it was flashed with")
            record = self._store.current()
            lost = len(record.packets) - len(self._live.packets)
            self._commit(record.without(lost or 1), self._build)
        return self.status()

    def current(self) -> tuple[TaskState, dict[str, np.ndarray]]:
        """The state in force, and its merged weights and head, float32, by the names of the model's own: computed anew."""
        live = self._live
        return live.state, self._merged(live.state, live.factors)

    def _commit(self, record: Generation, build: Callable[[Generation], _Live]) -> float | None:
        """Put a record in force, once its canary is as it should be: returns the largest difference."""
        with self._store.replacing(record) as generation:
            new = build(generation)
            difference = self._check_canary(new)
        self._live = new
        self._publish()
        return difference

    def _recalling(self, record: Generation, recall: Recall) -> Generation:
        """The record after a recall: before the first packet that it names, where this device holds one."""
        manifest, recalled = self.bundle.manifest, recall.recalled
        if recall.lineage != manifest.lineage:
            raise NotForThisDevice(f"the recall of task {recalled.sequence} is for another lineage ({recall.lineage[:12]})")
        if any(known.covers(recalled.sequence, recalled.revision) for known in record.recalled):
            raise NothingToDo(f"task {recalled.sequence} in revision {recalled.revision} is recalled already")
        if recalled.covers(manifest.task, manifest.revision):
            raise NotForThisDevice(
                f"the recalled task {recalled.sequence} is part of the bundle itself, which knows task {manifest.task}: "
                "flash this device with another bundle"
            )
        held = [
            any(recalled.covers(*mark) for mark in enumerate(packet.revisions, packet.first)) for packet in self._packets(record)
        ]
        dropped = len(held) - held.index(True) if True in held else 0
        return replace(record.without(dropped), recalled=with_recall(record.recalled, recalled))

    def status(self) -> dict[str, Any]:
        """Where this device stands, as plain values."""
        live, manifest, record = self._live, self.bundle.manifest, self._store.current()
        return {
            "generation": live.counter,
            "task": live.state.task,
            "task_name": live.state.name,
            "revision": live.revision,
            "highest_task": record.highest,
            "recalled": [[r.sequence, r.revision] for r in record.recalled],
            "trust_version": live.trust.version,
            "state": live.state.digest,
            "lineage": manifest.lineage,
            "bundle": self.bundle.id,
            "model": manifest.model,
            "target": manifest.target,
            "precision": manifest.precision,
            "classes": list(live.state.classes),
            "packets": len(live.packets),
            "store_bytes": self._store.size(),
            "damage": [*filter(None, [live.damage]), *self._store.damage()],
        }

    def _publish(self) -> None:
        """Let the engine tell programs beside this one, unless another process has gone on meanwhile. What fails is done again
        when the store is next opened: the generation is in force without it."""
        try:
            with self._store.lock("publish.lock", wait=True):
                if self._serves(self._store.current()):
                    self._engine.publish(self._live.loaded)
        except StorageError as error:
            log.warning("generation %d is in force here, but not published: %s", self._live.counter, error)

    def _follow_store(self) -> None:
        generation = self._store.current()
        if generation.counter < self._live.record.counter:
            raise InputError("the store has lost its newest generation record: open it again to go on from the one before it")
        if not self._serves(generation):
            self._live = self._restore(generation)

    def _serves(self, generation: Generation) -> bool:
        """Whether nothing was committed or mended since. By the whole record: where one was lost, its number is given again."""
        live = self._live
        return generation == live.record and not (live.damage and self._store.lost(generation.digests) != live.lost)

    def _whole_record(self) -> Generation:
        """The record in force, without the packets that cannot be served."""
        record = self._store.current()
        return record.without(len(record.packets) - len(self._live.packets))

    def _restore(self, record: Generation) -> _Live:
        """The generation of a record, or the longest beginning of it that is whole and healthy, with the keys of all of it."""
        served, damage = record, ""
        while True:
            try:
                live = self._build(served if served is record else replace(served, counter=self._store.number(served.packets)))
                self._check_canary(live)
                damage = live.damage or damage
                return replace(live, record=record, damage=damage, lost=self._store.lost(record.digests) if damage else ())
            except StorageError:
                raise  # of an engine that cannot write: nothing is damaged
            except (InputError, TrustError, HealthError) as error:
                if (now := self._store.current()) != record:  # another process went on, and swept what this one was reading
                    return self._restore(now)
                if not served.packets:
                    raise
                lost = len(record.packets) - len(self._store.whole(served.packets[:-1]))
                served = record.without(lost)
                damage = damage or f"generation {record.counter} is served without its last {lost}: {error}"

    def _lost_keys(self, record: Generation) -> str:
        """Which packet of keys cannot be read any more, if one cannot."""
        for digest, _ in record.trust:
            try:
                self._store.packet(digest)
            except InputError as error:
                return f"no packet is taken before this is mended: {error}"
        return ""

    def _mend(self, data: bytes) -> bool:
        """Whether these are the bytes of a damaged packet that the generation in force names, and with them more of it is served,
        or as much as before where the damage came while it was being served."""
        record, before, digest = self._store.current(), self._live, sha256(data)
        if digest not in record.digests or not (before.damage or self._store.whole((digest,)) == ()):
            return False
        self._store.add_packet(data)
        self._live = self._restore(record)
        return not before.damage or (self._live.packets, self._live.damage) != (before.packets, before.damage)

    def _keys(self, record: Generation) -> list[tuple[int, Trust]]:
        """The keys a record goes through: each with the place in its packets from which on they are in force."""
        keys = [(0, self.bundle.trust)]
        for digest, begin in record.trust:
            try:
                keys.append((begin, follow_trust(keys[-1][1], [self._store.packet(digest)])))
            except InputError:  # damaged: the keys before it are replaced all the same
                return [*keys, (begin, NOBODY)]
        return keys

    def _packets(self, record: Generation) -> list[Packet]:
        """Its packets, each verified with the keys that were in force when it was applied."""
        keys = self._keys(record)
        trusts = [[trust for begin, trust in keys if begin <= i][-1] for i in range(len(record.packets))]
        return [read_packet(self._store.packet(digest), trust) for digest, trust in zip(record.packets, trusts)]

    def _build(self, record: Generation) -> _Live:
        """The generation of a record, made from the bundle; where its keys are damaged, that is its damage."""
        manifest = self.bundle.manifest
        seed, logits = manifest.canary["seed"], np.array(manifest.canary["logits"], np.float32)
        trust = self._keys(record)[-1][1]
        flashed = _Live(record.counter, (), self.bundle.state, (), seed, logits, trust, manifest.revision, None, record)
        damage = self._lost_keys(record)
        lost = self._store.lost(record.digests) if damage else ()
        return replace(self._follow(flashed, self._packets(record), record), damage=damage, lost=lost)

    def _rekeyed(self, live: _Live, keys: Trust, record: Generation) -> _Live:
        """The generation of a record that has other keys, and nothing else, than the one that is served."""
        counter = self._store.number(live.packets) if live.damage else record.counter
        return replace(live, trust=keys, counter=counter, record=record.confirmed())

    def _follow(self, live: _Live, packets: Sequence[Packet], record: Generation) -> _Live:
        """The generation of a record, made from another one and the packets it has more."""
        manifest, state, factors = self.bundle.manifest, live.state, list(live.factors)
        seed, logits, revision = live.canary_seed, live.canary_logits, live.revision
        for packet in packets:
            state = packet.check(state, manifest.lineage, manifest.projections, revision)
            factors += [dict(update.factors) for update in packet.updates]
            seed, logits, revision = packet.canary_seed, packet.canary_logits, packet.revision
        loaded = self._engine.load(self._merged(state, factors))
        made_from = record.confirmed()
        return _Live(record.counter, record.packets, state, tuple(factors), seed, logits, live.trust, revision, loaded, made_from)

    def _merged(self, state: TaskState, factors: Sequence[Mapping[str, Factors]]) -> dict[str, np.ndarray]:
        """W_t and the head of a state; factors: of the tasks after the bundle's."""
        coefficients = state.magnitudes - extended(self.bundle.state.magnitudes, state.magnitudes)
        weights = merge(self.bundle.weights, self.bundle.manifest.projections, [*self.bundle.factors, *factors], coefficients)
        return weights | {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}

    def _check_canary(self, live: _Live) -> float | None:
        """The largest difference; None where the engine runs nothing. Raises HealthError."""
        if not self._engine.runs:
            return None
        tolerance = self.bundle.canary_tolerance
        inputs = canary.inputs(live.canary_seed, self._prepare, len(live.canary_logits))
        difference = canary.largest_difference(self._engine.run(live.loaded, inputs), live.canary_logits)
        if not difference <= tolerance:
            raise HealthError(
                f"canary of task {live.state.task} failed: logits differ by {difference:.2g}, more than {tolerance:g}; "
                "the generation before it stays in force"
            )
        return difference


def open_packet(path: Path, bundle: Bundle, trust: Trust) -> Packet | Rotation | Recall:
    """Read a packet file, verify it against keys, and that it belongs to the bundle's lineage."""
    packet = read_any(files.receive(path, LIMITS.packet), trust)
    lineage = packet.manifest["lineage"] if isinstance(packet, Packet) else getattr(packet, "lineage", bundle.manifest.lineage)
    if lineage != bundle.manifest.lineage:
        raise NotForThisDevice(f"{path} belongs to another lineage than {bundle.path}")
    return packet

"""The device: opens a store, predicts, applies packets, rolls back. One reference is swapped; nothing else is shared."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..bundle import HEAD_BIAS, HEAD_WEIGHT, MANIFEST, Bundle, open_bundle
from ..canonical import sha256
from ..errors import HealthError, InputError, NotForThisDevice, NothingToDo, StorageError, TrustError
from ..packet import LIMITS, Packet
from ..packet import read as read_packet
from ..state import Factors, TaskState, advance, extended, merge
from . import canary
from .engines import open_engine
from .preprocessing import Picture, Preprocessing
from .store import Generation, Store

log = logging.getLogger("sdlora_edge")


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
    loaded: Any
    damage: str = ""
    """why these are fewer packets than the generation in force names"""


class Device:
    """A device's model. `predict` may be called from any number of threads while one thread calls `apply`."""

    def __init__(self, store: Store, bundle: Bundle, threads: int = 0, unproved: bool = False) -> None:
        self.bundle = bundle
        self._store = store
        self._prepare = Preprocessing.from_manifest(bundle.manifest.preprocessing)
        generation = store.current()
        if generation.bundle != bundle.id:
            raise InputError(f"{bundle.path / MANIFEST} is not the one this store was made with: flash the device again")
        self._engine = open_engine(bundle, threads, store.path / "engine", unproved)
        self._live = self._restore(generation)
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
        """Verify a packet, build the new weights beside the old, run the canary, commit, swap.

        Until this returns the old generation answers; where it raises, the old one stays in force: InputError or LimitError
        (unreadable), TrustError (signature, replay), NotForThisDevice (lineage, order, capacity), HealthError (canary),
        NothingToDo (applied already). After a rollback, packets not newer than the newest ever confirmed are refused
        unless `allow_older`. Returns what `status` does, with the canary's largest difference and the milliseconds it took.
        """
        begin = time.perf_counter()
        data = files.read(Path(packet), LIMITS.packet)
        verified = read_packet(data, self.bundle.trust)
        with self._store.lock():
            self._refresh()
            if self._mend(data):
                self._publish()
                return self._applied(self._check_canary(self._live), begin)
            live, manifest = self._live, self.bundle.manifest
            verified.check(live.state, manifest.lineage, manifest.projections)
            highest = self._store.current().highest
            if verified.sequence <= highest and not allow_older:
                raise TrustError(
                    f"packet {verified.sequence} is not newer than packet {highest}, which this device has confirmed and then "
                    "rolled back; to take it again on purpose, use --allow-older"
                )
            self.bundle.require_room(len(live.state.classes) + len(verified.update.classes))
            self._store.sweep()
            packets = (*live.packets, self._store.add_packet(data))
            with self._store.replacing(packets, verified.sequence) as generation:
                new = self._follow(live, [verified], packets, generation.counter)
                difference = self._check_canary(new)
            self._live = new
            self._publish()
        return self._applied(difference, begin)

    def _applied(self, difference: float, begin: float) -> dict[str, Any]:
        elapsed = (time.perf_counter() - begin) * 1000
        return {**self.status(), "canary_difference": difference, "apply_ms": round(elapsed, 1)}

    def rollback(self) -> dict[str, Any]:
        """Go back by one packet, for good; from a damaged generation, to what is left of it.

        Raises NothingToDo in the bundle's own state, HealthError (canary).
        """
        with self._store.lock():
            self._refresh()
            if not self._store.current().packets:
                raise NothingToDo("nothing to roll back: this device is in the state it was flashed with")
            packets = self._live.packets if self._live.damage else self._live.packets[:-1]
            with self._store.replacing(packets, 0) as generation:
                new = self._build(packets, generation.counter)
                self._check_canary(new)
            self._live = new
            self._publish()
        return self.status()

    def current(self) -> tuple[TaskState, dict[str, np.ndarray]]:
        """The state in force, and its merged weights and head, float32, by the names of the model's own: computed anew."""
        live = self._live
        return live.state, self._merged(live.state, live.factors)

    def status(self) -> dict[str, Any]:
        """Where this device stands, as plain values."""
        live, manifest = self._live, self.bundle.manifest
        return {
            "generation": live.counter,
            "task": live.state.task,
            "task_name": live.state.name,
            "highest_task": self._store.current().highest,
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
                if self._live.damage or self._store.current().counter == self._live.counter:
                    self._engine.publish(self._live.loaded)
        except StorageError as error:
            log.warning("generation %d is in force here, but not published: %s", self._live.counter, error)

    def _refresh(self) -> None:
        """Follow what another process has committed since this one opened the store."""
        generation = self._store.current()
        if generation.counter < self._live.counter:
            raise InputError("the store has lost its newest generation record: open it again to go on from the one before it")
        if generation.counter > self._live.counter:
            self._live = self._restore(generation)

    def _restore(self, generation: Generation) -> _Live:
        """The generation, or the longest beginning of it that is whole and healthy."""
        packets, damage = generation.packets, ""
        while True:
            try:
                live = self._build(packets, generation.counter if packets == generation.packets else self._store.number(packets))
                self._check_canary(live)
                return replace(live, damage=damage)
            except StorageError:
                raise  # of an engine that cannot write: nothing is damaged
            except (InputError, HealthError) as error:
                if (now := self._store.current()) != generation:  # another process went on, and swept what this one was reading
                    return self._restore(now)
                if not packets:
                    raise
                packets = self._store.whole(packets[:-1])
                damage = (
                    f"generation {generation.counter} is served without its last {len(generation.packets) - len(packets)}: {error}"
                )

    def _mend(self, data: bytes) -> bool:
        """Whether these are the bytes of a damaged packet that the generation in force names, and more of it is served with them."""
        generation, left = self._store.current(), len(self._live.packets)
        if sha256(data) not in generation.packets[left:]:
            return False
        self._store.add_packet(data)
        self._live = self._restore(generation)
        return len(self._live.packets) > left

    def _build(self, digests: tuple[str, ...], counter: int) -> _Live:
        """The generation made of the bundle and these packets."""
        packets = [read_packet(self._store.packet(d), self.bundle.trust) for d in digests]
        seed, logits = self.bundle.manifest.canary["seed"], np.array(self.bundle.manifest.canary["logits"], np.float32)
        flashed = _Live(counter, (), self.bundle.state, (), seed, logits, None)
        return self._follow(flashed, packets, digests, counter)

    def _follow(self, live: _Live, packets: Sequence[Packet], digests: tuple[str, ...], counter: int) -> _Live:
        manifest, state, factors = self.bundle.manifest, live.state, list(live.factors)
        seed, logits = live.canary_seed, live.canary_logits
        for packet in packets:
            packet.check(state, manifest.lineage, manifest.projections)
            state = advance(state, packet.update)
            factors.append(dict(packet.update.factors))
            seed, logits = packet.canary_seed, packet.canary_logits
        loaded = self._engine.load(self._merged(state, factors))
        return _Live(counter, digests, state, tuple(factors), seed, logits, loaded)

    def _merged(self, state: TaskState, factors: Sequence[Mapping[str, Factors]]) -> dict[str, np.ndarray]:
        """W_t and the head of a state; factors: of the tasks after the bundle's."""
        coefficients = state.magnitudes - extended(self.bundle.state.magnitudes, state.magnitudes)
        weights = merge(self.bundle.weights, self.bundle.manifest.projections, [*self.bundle.factors, *factors], coefficients)
        return weights | {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}

    def _check_canary(self, live: _Live) -> float:
        if not self._engine.runs:
            return float("nan")
        manifest = self.bundle.manifest
        inputs = canary.inputs(live.canary_seed, self._prepare, len(live.canary_logits))
        difference = canary.largest_difference(self._engine.run(live.loaded, inputs), live.canary_logits)
        if not difference <= manifest.tolerance:
            raise HealthError(
                f"canary of task {live.state.task} failed: logits differ by {difference:.2g}, more than {manifest.tolerance:g}; "
                "the generation before it stays in force"
            )
        return difference


def open_packet(path: Path, bundle: Bundle) -> Packet:
    """Read and verify a packet file against a bundle's keys, and that it belongs to the bundle's lineage."""
    packet = read_packet(files.read(path, LIMITS.packet), bundle.trust)
    if packet.manifest["lineage"] != bundle.manifest.lineage:
        raise NotForThisDevice(f"{path} belongs to another lineage than {bundle.path}")
    return packet

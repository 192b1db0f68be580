"""What a device serves, and how it is made from a record of its store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..acceptance import Standing, accept_update
from ..errors import UNWRITTEN, HealthError, InputError, TrustError
from ..formats.bundle import Bundle
from ..formats.encoding import Factors
from ..formats.packet import Packet
from ..formats.signing import Trust
from ..inputs import canary
from ..inputs.modality import preparation
from ..results import Status
from ..state import TaskState
from .chain import Chain
from .engines import Engine
from .gate import one_blas_thread
from .records import Generation
from .store import Store


@dataclass(eq=False)
class Live:
    """Everything that one generation needs to answer.

    Never changed, except for `loaded` if memory is short: an update makes another one and swaps the
    reference.

    Args:
        record: The record in force when it was made.
        packets: Digests of the packets it consists of.
        state: The task state.
        factors: Of each task after the bundle's.
        canary_seed: Seed of the canary's inputs.
        canary_logits: float32 (count, live classes), what the host computed.
        trust: The keys in force.
        revision: Revision of the last task.
        loaded: The engine's; None while it is given up.
        damage: Why it has fewer packets than the record names, or why it is unknown who may sign.
        damaged: Packets of the record that were damaged when it was made.
    """

    record: Generation
    packets: tuple[str, ...]
    state: TaskState
    factors: tuple[dict[str, Factors], ...]
    canary_seed: int
    canary_logits: np.ndarray
    trust: Trust
    revision: int
    loaded: Any = None
    damage: str = ""
    damaged: tuple[str, ...] = ()

    @property
    def counter(self) -> int:
        """The generation's counter; 0 for what is left of a damaged one."""
        return self.record.counter if self.packets == self.record.packets else 0

    def standing(self, bundle: Bundle, record: Generation, allow_older: bool) -> Standing:
        """Where a device stands that serves this, for a packet that follows `record`."""
        manifest = bundle.manifest
        return Standing(
            manifest.lineage,
            manifest.projections,
            self.state,
            self.revision,
            (record.revision, record.highest),
            record.revoked,
            manifest.capacity,
            allow_older,
        )

    def status(
        self, bundle: Bundle, store_bytes: Mapping[str, int], damage: Sequence[str]
    ) -> Status:
        """Where a device stands that serves this. damage: what is damaged beside it."""
        manifest, confidence = bundle.manifest, self.state.confidence
        return Status(
            generation=self.counter,
            task=self.state.task,
            task_name=self.state.name,
            revision=self.revision,
            highest_task=self.record.highest,
            revoked=tuple((r.sequence, r.revision) for r in self.record.revoked),
            trust_version=self.trust.version,
            state=self.state.digest,
            lineage=manifest.lineage,
            bundle=bundle.id,
            model=manifest.model,
            target=manifest.target,
            precision=manifest.precision,
            classes=self.state.names,
            temperature=float(confidence.temperature[0]),
            threshold=confidence.least,
            packets=len(self.packets),
            store_bytes=store_bytes,
            damage=((self.damage,) if self.damage else ()) + tuple(damage),
        )


class Generations:
    """Makes generations: every packet verified, weights merged, canary checked.

    Args:
        store: The device's store.
        bundle: Its bundle.
        engine: Runs the model.

    Attributes:
        prepare: How the model's inputs are made.
        replaced: The generation whose weights are given up before others are loaded, if there is no
            memory for both.
    """

    def __init__(self, store: Store, bundle: Bundle, engine: Engine) -> None:
        self.engine = engine
        self.chain = Chain(store, bundle)
        self._store, self._bundle = store, bundle
        self.replaced: Live | None = None
        self.prepare = preparation(bundle.manifest.preprocessing, bundle.path)

    def longest(self, record: Generation) -> Live:
        """The generation of a record, or its longest intact and healthy prefix.

        A prefix has the keys of the whole record.

        Raises:
            InputError, TrustError, HealthError: Not even the bundle's own state can be served.
            StorageError, ResourceError: The engine cannot write, or memory ran out: nothing is
                damaged.
        """
        served, damage = record, ""
        while True:
            live: Live | None = None  # one whose canary failed is not kept beside the next
            try:
                live = self.build(served)
                self.check_canary(live)
            except UNWRITTEN:
                raise
            except (InputError, TrustError, HealthError) as error:
                if (now := self._store.current()).counter > record.counter:
                    # Not damage: another process went on, and swept what this one was reading.
                    record = served = now
                    continue
                if not served.packets:
                    raise
                served, damage = self._shorter(record, served), damage or str(error)
            else:
                return self._told(live, record, damage)

    def _shorter(self, record: Generation, served: Generation) -> Generation:
        """The prefix to try after `served` failed.

        It ends before the first packet whose file is damaged. If no file is, the newest packet
        failed (its signature, its place or its canary), so exactly that one goes. Each try is
        shorter than the one before: the loop ends.
        """
        damaged = self._store.damaged(served.packets[:-1])
        kept = served.packets.index(damaged[0]) if damaged else len(served.packets) - 1
        return record.without(len(record.packets) - kept)

    def _told(self, live: Live, record: Generation, damage: str) -> Live:
        """A generation that serves for `record`, with what is wrong with it."""
        if damage:
            damage = (
                f"generation {record.counter} is served up to task {live.state.task} only: {damage}"
            )
        damage = live.damage or damage
        damaged = self._store.damaged(record.digests) if damage else ()
        return replace(live, record=record.confirmed(), damage=damage, damaged=damaged)

    def may_repair(self, digest: str, live: Live) -> bool:
        """Whether the record in force names this packet, and something is damaged.

        live: What serves for the record in force.
        """
        return digest in live.record.digests and bool(live.damage or self._store.damaged((digest,)))

    @staticmethod
    def has_repaired(before: Live, now: Live) -> bool:
        """Whether more is served than before, or as much if the damage came while it was served."""
        return not before.damage or (now.packets, now.trust) != (before.packets, before.trust)

    def build(self, record: Generation) -> Live:
        """The generation of a record, made from the bundle.

        If its keys are damaged, that is its damage.
        """
        canary_seed, logits = self._bundle.manifest.canary.seed, self._bundle.canary_logits
        keys, revision = self.chain.trust(record), self._bundle.manifest.revision
        state = self._bundle.state
        flashed = Live(record, (), state, (), canary_seed, logits, keys, revision)
        damage = self.chain.lost_keys(record)
        damaged = self._store.damaged(record.digests) if damage else ()
        built = self.follow(flashed, self.chain.packets(record), record)
        return replace(built, damage=damage, damaged=damaged)

    def follow(self, live: Live, packets: Sequence[Packet], record: Generation) -> Live:
        """The generation of a record, made from another one and the packets that it has more."""
        manifest, state, revision = self._bundle.manifest, live.state, live.revision
        for packet in packets:
            standing = Standing(manifest.lineage, manifest.projections, state, revision)
            state, revision = accept_update(packet, standing), packet.revision
        return self.become(live, packets, state, record)

    def become(
        self, live: Live, packets: Sequence[Packet], state: TaskState, record: Generation
    ) -> Live:
        """As `follow`, with packets that were accepted. state: The one that they lead to."""
        factors = list(live.factors)
        seed, logits, revision = live.canary_seed, live.canary_logits, live.revision
        for packet in packets:
            factors += [dict(update.factors) for update in packet.updates]
            seed, logits, revision = packet.canary_seed, packet.canary_logits, packet.revision
        if self.replaced:
            self.replaced.loaded = None  # its memory is needed now
        return Live(
            record.confirmed(),
            record.packets,
            state,
            tuple(factors),
            seed,
            logits,
            live.trust,
            revision,
            self.load(state, factors),
        )

    def load(self, state: TaskState, factors: Sequence[Mapping[str, Factors]]) -> Any:
        """Merge the weights of a state into the engine's memory."""
        # Without factors there is nothing to multiply.
        limited = one_blas_thread() if any(factors) else contextlib.nullcontext()
        with limited:
            return self.engine.load(self._bundle.merged(state, factors))

    def check_canary(self, live: Live) -> float | None:
        """The largest difference; None if the engine runs no model. Raises HealthError."""
        if not self.engine.runs:
            return None
        inputs = canary.inputs(live.canary_seed, self.prepare, len(live.canary_logits))
        outputs = self.engine.outputs(live.loaded, inputs)
        if len(live.state.confidence.mean) and outputs.features is None:
            raise HealthError(
                f"the unknown score of task {live.state.task} needs the model's output `features`, "
                "which this bundle's model has not: export the bundle again, and flash this device"
            )
        return canary.check(
            outputs.logits[:, live.state.live],
            live.canary_logits,
            self._bundle.manifest.canary.tolerance,
            live.state.task,
            self.engine.advice,
        )

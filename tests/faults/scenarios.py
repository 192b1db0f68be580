"""What a device does while its power may fail, and what it must be found in afterwards.

A scenario is plain functions of a path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Fleet
from faults.simulator import Killed, Restarts, Simulator, Tree

from sdlora_edge.device import Device
from sdlora_edge.device.store import Store
from sdlora_edge.errors import HealthError, NothingToDo
from sdlora_edge.formats import control, packet, signing
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.control import Revoked
from sdlora_edge.formats.packet import Packet
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.results import Status
from sdlora_edge.state import TaskUpdate, changed_rows
from sdlora_edge.train.run import Run

Step = Callable[[Path], object]
STORE = "device/store"
"""below the root of the simulated disk: even the folder it lies in is not there before init"""


class Found(NamedTuple):
    """A generation as a restarted device serves it: its number, the highest task confirmed, its logits, to the bit, the version of
    the keys it obeys, and what it never takes again."""

    generation: int
    highest: int
    logits: str
    trust_version: int
    revoked: tuple[tuple[int, int], ...]


class Promised(NamedTuple):
    """The task, the version of the keys (0: lost) and what is never taken again, as (sequence, revision)."""

    task: int
    trust_version: int = 1
    revoked: tuple[tuple[int, int], ...] = ()


NOTHING = "no store"


@dataclass(frozen=True)
class Scenario:
    """before: what has happened already, all of it synced. steps: what the power fails in. promised: what the device stands at
    before them and after each one, where that is more than what a step was seen to lead to. between: steps that lead, one after
    the other, to the states that a cut may leave too: a step of several commits goes by way of them.
    """

    before: tuple[Step, ...]
    steps: tuple[Step, ...]
    promised: tuple[Promised, ...] = ()
    between: tuple[Step, ...] = ()


NAMES = (
    "init",
    "apply",
    "apply a chain of three",
    "catch up",
    "failed canary",
    "failed canary, then the right packet",
    "rollback",
    "rollback, then forward again",
    "clean-up",
    "repair a damaged packet",
    "repair a damaged record",
    "rotation of keys",
    "rotation, then a packet signed by the new keys",
    "repair damaged keys",
    "revocation",
    "squash",
    "retire and rename",
)


@dataclass
class Report:
    """points: where the power was cut. operations: what the step did. states: different disks that were left. restarts: those that a restart can tell apart.
    problems: one line each.
    """

    points: int = 0
    operations: int = 0
    states: int = 0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)


class Fixture:
    """A fleet, what its generations answer, and the scenarios played with it."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.folder = fleet, folder
        self.wrong = wrong_canary(fleet, folder)
        self.orders = Orders(fleet, folder)
        Device.init(fleet.bundle, folder / "reference")
        device = Device.open(folder / "reference", threads=1)
        prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
        images = (
            np.random.default_rng(0)
            .integers(0, 255, (4, prepare.size, prepare.size, 3))
            .astype(np.uint8)
        )
        self.inputs = prepare.arrays(images)
        self.logits = [self.digest(device)]
        for path in fleet.packets:
            device.apply(path)
            self.logits.append(self.digest(device))
        device.apply(self.orders.retiring)
        self.logits.append(self.digest(device))
        self.restarts = Restarts(self.restart, folder / "restarts")
        (folder / "restarts").mkdir()
        self._played = 0

    def digest(self, device: Device) -> str:
        return sha256(device.logits(self.inputs).tobytes())

    def observe(self, store: Path) -> Found | str:
        if not store.exists():
            return NOTHING
        device = Device.open(store, threads=1)
        status = device.status()
        revoked = tuple((sequence, revision) for sequence, revision in status.revoked)
        return Found(
            status.generation,
            status.highest_task,
            self.digest(device),
            status.trust_version,
            revoked,
        )

    def restart(self, root: Path) -> Found | str:
        """Open what a disk was left in, and go on: make the store anew where there is none, apply the next packet."""
        store = root / STORE
        found = self.observe(store)
        if found == NOTHING:
            Device.init(self.fleet.bundle, store)
        device = Device.open(store, threads=1)
        while device.status().task >= len(self.fleet.packets):
            device.rollback()
        task = device.status().task
        assert self.digest(device) == self.logits[task]
        if device.status().trust_version == 0:
            device.apply(self.orders.rotation)
        device.apply(self.orders.packet_for(device.status()), allow_older=True)
        again = Device.open(store, threads=1)
        assert again.status().task == task + 1
        assert again.status().damage == ()
        assert self.digest(again) == self.digest(device) == self.logits[task + 1]
        assert not [p for p in store.rglob("*") if p.name.startswith(".tmp-")]
        return found

    def play(
        self,
        scenario: Scenario,
        die_at: int = 0,
        sabotage: Callable[[Simulator, pytest.MonkeyPatch], object] | None = None,
    ) -> Report:
        """Cut the power at every point of a scenario, in every way, and restart.

        While a step runs, what was before it or what it leads to may be found; once it has
        returned, only the latter. Where the scenario says what it promises, that is what must be
        found. die_at: the first process is killed instead of its n-th operation, and a second one
        does the step again: the power fails in either. sabotage: breaks the store while the steps
        run, and the first problem ends the play.
        """
        self._played += 1
        root = self.folder / f"played{self._played}"
        root.mkdir()
        store = root / STORE
        for step in scenario.before:
            step(store)
        seen = [self.observe(store)]
        between = self._between(scenario, self.folder / f"between{self._played}" / STORE)
        left: list[dict[object, Tree]] = []

        def at_point(trees: list[Tree]) -> None:
            left[-1].update({frozenset(tree.items()): tree for tree in trees})

        simulator = Simulator(root, at_point, die_at)
        for step in scenario.steps:
            left.append({})
            with simulator.installed() as patch:
                if sabotage is not None:
                    sabotage(simulator, patch)
                try:
                    step(store)
                except Killed:
                    simulator.die_at = 0
                    step(store)
            left.append({})
            at_point(simulator.top.trees())
            seen.append(self.observe(store))
        before = self.restarts.count
        report = Report(simulator.points, simulator.operations, len(set().union(*left)))
        if scenario.promised:
            wanted = [
                (self.logits[task], keys, revoked) for task, keys, revoked in scenario.promised
            ]
            found = [one[2:] for one in seen]  # all but the two counts
            report.problems += [
                f"after step {i}: {seen[i]!r}" for i in range(len(seen)) if found[i] != wanted[i]
            ]
        for index, trees in reversed(list(enumerate(left))):
            allowed = {seen[index // 2 + index % 2], seen[index // 2 + 1]}
            allowed |= set() if index % 2 else between
            for tree in trees.values():
                if (outcome := self.restarts.outcome(tree)) not in allowed:
                    report.problems.append(
                        f"{'after' if index % 2 else 'during'} step {index // 2 + 1}: {outcome!r}"
                    )
                    if sabotage is not None:  # one is enough
                        return report
        report.restarts = self.restarts.count - before
        return report

    def _between(self, scenario: Scenario, store: Path) -> set[Found | str]:
        if not scenario.between:
            return set()
        for step in scenario.before:
            step(store)
        found = set()
        for step in scenario.between:
            step(store)
            found.add(self.observe(store))
        return found

    def scenarios(self) -> dict[str, Scenario]:
        first, second, third = (self.apply(path) for path in self.fleet.packets)
        control = self.orders
        rotation, revocation, squash, renewed = map(
            self.apply, (control.rotation, control.revocation, control.squash, control.renewed[1])
        )
        return {
            "init": Scenario((), (self.init,)),
            "apply": Scenario((self.init,), (first,)),
            "apply a chain of three": Scenario((self.init,), (first, second, third)),
            "catch up": Scenario(
                (self.init,),
                (self.apply_all(*self.catching_up),),
                (Promised(0), Promised(3, 2)),
                (self.apply_all(*self.catching_up[:2]), rotation),
            ),
            "failed canary": Scenario((self.init,), (self.refused,)),
            "failed canary, then the right packet": Scenario((self.init, self.refused), (first,)),
            "rollback": Scenario((self.init, first, second), (rollback_to(1), rollback_to(0))),
            "rollback, then forward again": Scenario(
                (self.init, first, second, rollback_to(1)), (second, third)
            ),
            "clean-up": Scenario((self.init, first, leave_rubbish), (second,)),
            "repair a damaged packet": Scenario(
                (self.init, first, second, damage_newest), (second,)
            ),
            "repair a damaged record": Scenario(
                (self.init, first, second, damage_record), (third,)
            ),
            "rotation of keys": Scenario(
                (self.init, first), (rotation,), (Promised(1), Promised(1, 2))
            ),
            "rotation, then a packet signed by the new keys": Scenario(
                (self.init, first),
                (rotation, renewed),
                (Promised(1), Promised(1, 2), Promised(2, 2)),
            ),
            "repair damaged keys": Scenario(
                (self.init, first, rotation, damage_keys),
                (rotation,),
                (Promised(1, 0), Promised(1, 2)),
            ),
            "revocation": Scenario(
                (self.init, first, second), (revocation,), (Promised(2), Promised(1, 1, ((2, 0),)))
            ),
            "squash": Scenario((self.init, first), (squash,), (Promised(1), Promised(3))),
            "retire and rename": Scenario(
                (self.init, first, second, third),
                (self.apply(control.retiring),),
                (Promised(3), Promised(4)),
            ),
        }

    def init(self, store: Path) -> None:
        if store.exists():
            acknowledge(store)
        else:
            Device.init(self.fleet.bundle, store)

    @property
    def catching_up(self) -> tuple[Path, ...]:
        """Two updates as one, other keys, and an update that those have signed."""
        return (*self.fleet.packets[:2], self.orders.rotation, self.orders.renewed[2])

    def apply_all(self, *paths: Path) -> Step:
        def step(store: Path) -> None:
            Device.open(store, threads=1).apply_all(paths, allow_older=True)

        return step

    def apply(self, path: Path) -> Step:
        def step(store: Path) -> None:
            with contextlib.suppress(NothingToDo):  # a process that was killed has done it
                Device.open(store, threads=1).apply(path, allow_older=True)

        return step

    def refused(self, store: Path) -> None:
        with contextlib.suppress(HealthError):
            Device.open(store, threads=1).apply(self.wrong)


def rollback_to(task: int) -> Step:
    def step(store: Path) -> None:
        device = Device.open(store, threads=1)
        if device.status().task > task:
            device.rollback()
        else:
            acknowledge(store)

    return step


def acknowledge(store: Path) -> None:
    """A process that was killed has done it already; whoever takes the lock makes it stay."""
    with Store(store).lock():
        pass


def leave_rubbish(store: Path) -> None:
    """What cuts and failed packets leave behind."""
    (store / "packets" / ("ab" * 32)).write_bytes(b"of no generation")
    (store / "packets" / ".tmp-left").write_bytes(b"")
    (store / ".tmp-generation.0.json").write_bytes(b"half")


def damage_newest(store: Path) -> None:
    flip(store / "packets" / Store(store).current().packets[-1], -1)


def damage_keys(store: Path) -> None:
    flip(store / "packets" / Store(store).current().trust[-1][0], -1)


def damage_record(store: Path) -> None:
    flip(store / f"generation.{Store(store).current().counter % 2}.json", 20)


def flip(path: Path, position: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


class Orders:
    """Other keys, and the tasks signed by them; revocations, and revision 1 of what they take back; squashes.

    The states are those of the fleet's own packets, so the logits are too.
    """

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        old = signing.load_signer(fleet.key)
        new = signing.load_signer(signing.new_key("new", folder / "keys")[0])
        newer = signing.load_signer(signing.new_key("newer", folder / "keys")[0])
        self.trust = signing.Trust((new.public_key,), 1, 2)
        both = signing.Trust((new.public_key, newer.public_key), 1, 3)
        self._folder, self._run = folder, Run.open(fleet.run)
        read = [packet.read(path.read_bytes(), fleet.trust) for path in fleet.packets]
        self.old = fleet.packets
        self.renewed = [self._again(one, new, 0) for one in read]
        """by the new keys"""
        self.revised = [self._again(one, old, 1) for one in read]
        """by the old keys, each in revision 1"""
        self.renewed_and_revised = [self._again(one, new, 1) for one in read]
        self.rotation = self._keep(
            "rotation", control.build_trust(self.trust, lambda p: signing.sign(p, [old, new]))
        )
        self.second_rotation = self._keep(
            "rotation2", control.build_trust(both, lambda p: signing.sign(p, [new, newer]))
        )
        """adds a key to the new ones, which stay"""
        self.revocations = [self._revocation(task, old) for task in (1, 2, 3)]
        self.revocation = self.revocations[1]
        self.renewed_revocation = self._revocation(2, new)
        self.squashes = [
            self._squash(read[:2], old),
            self._squash(read, old),
            self._squash(read[1:], old),
        ]
        self.squash = self.squashes[-1]
        self.retiring = self._retiring(read[-1], old)
        """task 4: it retires the first class and renames the second, and brings nothing else"""

    def packet_for(self, status: Status) -> Path:
        """What a device takes next, by the keys it obeys and what was revoked."""
        packets = (
            self.renewed
            if status.trust_version == 2
            else self.revised
            if status.revoked
            else self.old
        )
        return packets[status.task]

    def _again(self, one: Packet, signer: signing.CryptoSigner, revision: int) -> Path:
        before, name = (
            self._run.states[one.first - 1],
            f"{one.sequence}.{revision}.{signer.public_key.keyid[:6]}",
        )
        sign = lambda payload: signing.sign(payload, [signer])  # noqa: E731
        contents = packet.Contents(
            lineage=self._run.lineage,
            begin=before.digest,
            updates=one.updates,
            canary_seed=one.canary_seed,
            canary_logits=one.canary_logits,
            revisions=(revision,),
        )
        return self._keep(name, packet.build(contents, sign))

    def _retiring(self, last: Packet, signer: signing.CryptoSigner) -> Path:
        state = self._run.states[last.sequence]
        head = changed_rows(state, state.head_weight, state.head_bias, (0,))
        deltas = np.zeros(last.sequence + 1)
        update = TaskUpdate(
            last.sequence + 1, "changes", (), deltas, head, {}, (0,), ((1, "another name"),)
        )
        contents = packet.Contents(
            lineage=self._run.lineage,
            begin=state.digest,
            updates=(update,),
            canary_seed=last.canary_seed,
            canary_logits=np.ascontiguousarray(last.canary_logits[:, 1:]),
        )
        data = packet.build(contents, lambda payload: signing.sign(payload, [signer]))
        return self._keep("retiring", data)

    def _revocation(self, task: int, signer: signing.CryptoSigner) -> Path:
        """Of a task and those after it, in revision 0."""
        data = control.build_revocation(
            self._run.lineage, Revoked(task, 0), lambda p: signing.sign(p, [signer])
        )
        return self._keep(f"revocation{task}.{signer.public_key.keyid[:6]}", data)

    def _squash(self, packets: list[Packet], signer: signing.CryptoSigner) -> Path:
        name = f"squash{packets[0].first}{packets[-1].sequence}"
        return self._keep(name, packet.squash(packets, lambda p: signing.sign(p, [signer])))

    def _keep(self, name: str, data: bytes) -> Path:
        path = self._folder / f"{name}.sdlora"
        path.write_bytes(data)
        return path


def wrong_canary(fleet: Fleet, folder: Path) -> Path:
    """A genuine first packet whose canary the device cannot meet."""
    run = Run.open(fleet.run)
    logits = np.full((2, len(run.states[1].classes)), 3.0, np.float32)
    signers = [signing.load_signer(fleet.key)]
    contents = packet.Contents(
        lineage=run.lineage,
        begin=run.states[0].digest,
        updates=(run.updates[0],),
        canary_seed=1,
        canary_logits=logits,
    )
    data = packet.build(contents, lambda p: signing.sign(p, signers))
    (folder / "wrong.sdlora").write_bytes(data)
    return folder / "wrong.sdlora"

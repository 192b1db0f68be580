"""A device's life, by chance, and what holds after every step of it: PYTHONPATH=tests python -m faults.lives --lives 200

One store, and two programs that have it open all the while. Packets of every kind arrive in any
order; programs roll back, look again, start anew; files of the store are damaged and repaired.
Everything follows from the seed, but for the order in which a watcher tries packets of the same
tasks. A life that goes wrong ends with an AssertionError that tells its seed and its steps.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import SMALL, make_fleet
from faults.scenarios import Fixture, flip, leave_rubbish

from sdlora_edge.device import Device
from sdlora_edge.device.device import DOUBLE_BUFFER, IN_PLACE
from sdlora_edge.device.records import Generation
from sdlora_edge.device.store import Store
from sdlora_edge.device.watch.service import Watcher
from sdlora_edge.errors import HealthError, NotForThisDevice, NothingToDo, SdloraError, TrustError
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.control import read_any
from sdlora_edge.formats.packet import Packet
from sdlora_edge.results import Served, Status

STEPS = 30
SWAPS = {"A": DOUBLE_BUFFER, "B": IN_PLACE}
"""the two programs, and how each takes over an update"""
REFUSALS = (TrustError, NotForThisDevice, NothingToDo)
"""what a genuine packet may meet, whatever has happened before"""


class Stock:
    """Every packet that may arrive, and what is known of each by its digest."""

    def __init__(self, fixture: Fixture) -> None:
        orders = fixture.orders
        tasks = [
            *orders.old,
            *orders.renewed,
            *orders.revised,
            *orders.renewed_and_revised,
            *orders.squashes,
            fixture.wrong,
        ]
        self.revocations = [*orders.revocations, orders.renewed_revocation]
        self.paths = [*tasks, orders.rotation, orders.second_rotation, *self.revocations]
        self.by_digest = {sha256(path.read_bytes()): path for path in self.paths}
        self.versions = {sha256(path.read_bytes()): self._versions(path, fixture) for path in tasks}
        """(task, revision) of each task in a packet"""

    def _versions(self, path: Path, fixture: Fixture) -> list[tuple[int, int]]:
        for trust in (fixture.fleet.trust, fixture.orders.trust):
            try:
                found = read_any(path.read_bytes(), trust)
            except TrustError:
                continue
            assert isinstance(found, Packet)
            return found.versions
        raise AssertionError(path)

    def task_after(self, packets: tuple[str, ...]) -> int:
        return self.versions[packets[-1]][-1][0] if packets else 0


class Life:
    """A store in `folder`, and everything that happens to it."""

    def __init__(self, fixture: Fixture, stock: Stock, folder: Path, seed: int) -> None:
        self.fixture, self.stock, self.seed = fixture, stock, seed
        self.chance = random.Random(seed)  # noqa: S311
        self.steps: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.store, self.stick = folder / "store", folder / "stick"
        Device.init(fixture.fleet.bundle, self.store)
        self.devices = {
            name: Device.open(self.store, threads=1, swap=swap) for name, swap in SWAPS.items()
        }
        self.record = self.in_force()
        self.stick.mkdir()
        for path in self.chance.sample(stock.paths, self.chance.randint(1, len(stock.paths))):
            shutil.copy(path, self.stick)
        self.events: list[dict[str, Any]] = []
        self.watcher = self.new_watcher()

    def live(self, steps: int = STEPS) -> None:
        """Raises AssertionError with the seed and the steps."""
        actions: dict[Callable[[str], None], int] = {
            self.apply: 8,
            self.rollback: 2,
            self.restart: 2,
            self.refresh: 2,
            self.look: 1,
            self.damage_packet: 2,
            self.damage_record: 1,
            self.repair: 2,
            self.rubbish: 1,
        }
        try:
            for _ in range(steps):
                (action,) = self.chance.choices(list(actions), list(actions.values()))
                name = self.chance.choice("AB")
                action(name)
                self.check({name, *(other for other in self.devices if self.chance.random() < 0.4)})
            self.go_on(self.chance.choice("AB"))
        except Exception as error:
            told = "\n".join(f"    {step}" for step in self.steps)
            raise AssertionError(
                f"seed {self.seed}, after these steps:\n{told}\n{type(error).__name__}: {error}"
            ) from error

    # what may happen; `name` is the program that does it

    def apply(self, name: str) -> None:
        path, older = self.any_packet(), self.chance.random() < 0.7
        before = self.record
        self.tell(f"{name} applies {path.stem}{', older ones too' if older else ''}")
        allowed = (*REFUSALS, HealthError) if path == self.fixture.wrong else REFUSALS
        if self.attempt(lambda: self.devices[name].apply(path, allow_older=older), allowed):
            now = self.in_force()
            if now.counter > before.counter and path not in self.stock.revocations:
                assert self.unfinished() == []

    def rollback(self, name: str) -> None:
        self.tell(f"{name} rolls back")
        self.attempt(self.devices[name].rollback, (NothingToDo,))

    def restart(self, name: str) -> None:
        self.tell(f"{name} and the watcher start anew")
        self.devices[name] = Device.open(self.store, threads=1, swap=SWAPS[name])
        self.watcher = self.new_watcher()

    def refresh(self, name: str) -> None:
        self.tell(f"{name} refreshes")
        self.devices[name].refresh()

    def look(self, name: str) -> None:
        self.tell(
            f"{name} waits, while the watcher looks at {', '.join(sorted(path.stem for path in self.stick.iterdir()))}"
        )
        self.events.clear()
        report = self.watcher.look(settled=False)
        assert report.trouble is None
        assert {event["exit_code"] for event in self.events if "exit_code" in event} <= {4, 5, 6}, (
            self.events
        )
        self.devices[name].refresh()

    def damage_packet(self, name: str) -> None:
        folder = self.store / "packets"
        if files := [
            folder / digest for digest in self.stock.by_digest if (folder / digest).exists()
        ]:
            self.damage(self.chance.choice(files))
            self.devices[name].refresh()

    def damage_record(self, name: str) -> None:
        """One of the two. What is in force stays what it was."""
        records = Store(self.store).records()
        if None not in records.values():
            self.damage(self.chance.choice(list(records)))
            assert self.in_force() == self.record, "a record was lost with one of its two files"
            self.devices[name].refresh()

    def damage(self, path: Path) -> None:
        how, data = self.chance.choice(["flipped", "cut short", "grown", "gone"]), path.read_bytes()
        place = int(len(data) * self.chance.random())
        known = self.stock.by_digest.get(path.name, path)
        self.tell(
            f"{known.stem} in the store is {how}{f' at {place}' if how in ('flipped', 'cut short') else ''}"
        )
        if how == "flipped":
            flip(path, place)
        elif how == "cut short":
            path.write_bytes(data[:place])
        elif how == "grown":
            path.write_bytes(data + b"\0")
        else:
            path.unlink()

    def repair(self, name: str) -> None:
        """A packet's own bytes repair its file, even where it cannot be served yet, or never again."""
        if damaged := self.damaged():
            digest = self.chance.choice(damaged)
            self.tell(f"{name} repairs {self.stock.by_digest[digest].stem}")
            self.attempt(lambda: self.devices[name].apply(self.stock.by_digest[digest]), REFUSALS)
            assert digest not in self.damaged()

    def rubbish(self, name: str) -> None:
        self.tell("files are left behind by a process that was killed")
        leave_rubbish(self.store)
        self.devices[name].refresh()

    def go_on(self, name: str) -> None:
        """All damage is repaired by the packets themselves, and the next task comes."""
        device, orders = self.devices[name], self.fixture.orders
        self.chance.choice([self.repair_all, self.watch_all])(name)
        assert self.damaged() == []
        self.check({name})
        if device.status().task == len(orders.old):
            device.rollback()
        task = device.status().task
        packets = (
            orders.renewed_and_revised if device.status().trust_version > 1 else orders.revised
        )
        self.tell(f"{name} goes on to task {task + 1}")
        status = device.apply(packets[task], allow_older=True)
        assert (status.task, status.damage) == (task + 1, ())
        assert self.unfinished() == []
        assert Device.verify(self.store).intact
        self.check(set(self.devices))

    def repair_all(self, name: str) -> None:
        self.tell(f"{name} repairs everything")
        while damaged := self.damaged():
            self.attempt(
                lambda: self.devices[name].apply(self.stock.by_digest[damaged[0]]), REFUSALS
            )
            assert damaged[0] not in self.damaged()

    def watch_all(self, name: str) -> None:
        """A watcher with every packet before it needs one look to see the damage, and another one to repair it."""
        for path in self.stock.paths:
            shutil.copy(path, self.stick)
        self.watcher = self.new_watcher()
        self.look(name)
        self.look(name)

    # what holds after every step

    def check(self, followed: set[str]) -> None:
        """followed: programs that have looked at the store since the step, or do now."""
        record = self.in_force()
        self.check_nothing_is_forgotten(self.record, record)
        self.record = record
        damaged = self.damaged()
        device = Device.open(self.store, threads=1)
        fresh = device.status()
        self.check_fresh(fresh, record, damaged)
        if self.chance.random() < 0.3:  # it takes as long as all the rest
            self.check_verified(fresh, damaged)
        for name in sorted(followed):
            self.devices[name].refresh()
            self.check_running(name, fresh, record, damaged)
        for name, one in {**self.devices, "fresh": device}.items():
            status = one.status()
            assert self.fixture.digest(one) == self.fixture.logits[status.task], (
                f"{name} does not answer as its task does"
            )
        assert self.in_force() == record

    def check_nothing_is_forgotten(self, old: Generation, new: Generation) -> None:
        assert new.counter >= old.counter
        assert new.counter > old.counter or new == old
        assert (new.revision, new.highest) >= (old.revision, old.highest)
        for one in old.revoked:
            assert any(r.covers(one.sequence, one.revision) for r in new.revoked), (
                f"{one} is forgotten"
            )
        keys = [digest for digest, _ in old.trust]
        assert [digest for digest, _ in new.trust][: len(keys)] == keys

    def check_fresh(self, status: Status, record: Generation, damaged: list[str]) -> None:
        """It serves the longest beginning that can be served, and says what is missing."""
        served = self.whole_beginning(record, damaged)
        assert (status.packets, status.task) == (len(served), self.stock.task_after(served))
        assert status.generation == (record.counter if served == record.packets else 0)
        lost = any(digest in damaged for digest, _ in record.trust)
        assert status.trust_version == (0 if lost else 1 + len(record.trust))
        assert status.revoked == tuple((r.sequence, r.revision) for r in record.revoked)
        damaged = lost or served != record.packets or None in Store(self.store).records().values()
        assert bool(status.damage) == damaged, status.damage

    def check_verified(self, fresh: Status, damaged: list[str]) -> None:
        """`verify` and a program that opens the store say the same."""
        found = Device.verify(self.store)
        assert found.serves == Served(fresh.generation, fresh.task)
        assert found.intact == (not fresh.damage)
        records = {path.name for path, one in Store(self.store).records().items() if one is None}
        named = records | {f"packets/{digest}" for digest in damaged}
        if found.damage:
            # If no file is damaged, a packet that was revoked while it was damaged has been
            # repaired.
            assert {entry.file for entry in found.damage} == (named or {"."})

    def check_running(
        self, name: str, fresh: Status, record: Generation, damaged: list[str]
    ) -> None:
        """It agrees with a fresh one; but it may know what has been damaged since it was read."""
        status = self.devices[name].status()
        assert status.revoked == fresh.revoked
        assert status.highest_task == fresh.highest_task
        if not damaged:  # the words may name the generation in which the damage was found
            assert replace(status, damage=()) == replace(fresh, damage=()), name
            assert len(status.damage) == len(fresh.damage), name
        served = record.packets[: status.packets]
        assert len(served) >= fresh.packets
        assert status.task == self.stock.task_after(served)
        assert not any(self.is_revoked(digest, record) for digest in served), (
            f"{name} serves what was revoked"
        )
        assert status.trust_version in (0, 1 + len(record.trust))

    # what the store holds, found without the code that is tested, but for the reading of a record

    def in_force(self) -> Generation:
        return Store(self.store).current()

    def damaged(self) -> list[str]:
        """The packets of the record in force whose files are not what they were."""
        folder = self.store / "packets"
        return [
            digest
            for digest in self.in_force().digests
            if not (folder / digest).exists() or sha256((folder / digest).read_bytes()) != digest
        ]

    def whole_beginning(self, record: Generation, damaged: list[str]) -> tuple[str, ...]:
        """Its packets up to the first one that is damaged, was signed by keys that are damaged, or was revoked."""
        end = min(
            [len(record.packets), *(begin for digest, begin in record.trust if digest in damaged)]
        )
        for place, digest in enumerate(record.packets[:end]):
            if digest in damaged or self.is_revoked(digest, record):
                return record.packets[:place]
        return record.packets[:end]

    def is_revoked(self, digest: str, record: Generation) -> bool:
        return any(
            r.covers(*version) for r in record.revoked for version in self.stock.versions[digest]
        )

    def unfinished(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.name.startswith(".tmp-")]

    # helpers

    def tell(self, step: str) -> None:
        self.steps.append(step)

    def attempt(self, action: Callable[[], object], allowed: tuple[type[SdloraError], ...]) -> bool:
        """Whether it was done. What is refused leaves the record in force as it was."""
        before = self.in_force()
        try:
            action()
        except allowed as error:
            self.outcomes[type(error).__name__] += 1
            self.tell(f"    {type(error).__name__}: {error}")
            assert self.in_force() == before, "refused, and yet another record is in force"
            return False
        self.outcomes["done"] += 1
        return True

    def any_packet(self) -> Path:
        """Half of the time one that might come next: else most would be out of order."""
        task = self.stock.task_after(self.record.packets)
        following = [
            self.stock.by_digest[digest]
            for digest, tasks in self.stock.versions.items()
            if tasks[0][0] == task + 1
        ]
        return self.chance.choice(
            following if following and self.chance.random() < 0.5 else self.stock.paths
        )

    def new_watcher(self) -> Watcher:
        return Watcher(
            self.stick,
            self.store,
            emit=lambda event, fields: self.events.append({"event": event, **fields}),
            threads=1,
        )


def play(fixture: Fixture, folder: Path, seeds: Sequence[int], steps: int = STEPS) -> Counter[str]:
    """A life for each seed: how often what was tried was done, or ended in which error.

    Raises AssertionError.
    """
    stock, outcomes = Stock(fixture), Counter()
    for seed in seeds:
        place = folder / f"life{seed}"
        life = Life(fixture, stock, place, seed)
        life.live(steps)
        outcomes += life.outcomes
        shutil.rmtree(place)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    logging.getLogger("sdlora_edge").setLevel(
        logging.ERROR
    )  # every program that starts warns of the damage
    seeds, begin = range(arguments.first, arguments.first + arguments.lives), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = play(
            Fixture(make_fleet(Path(folder) / "fleet", dict(SMALL)), Path(folder)),
            Path(folder) / "lives",
            seeds,
        )
    print(
        f"{len(seeds) * STEPS} steps in {time.perf_counter() - begin:.0f} s, seeds {seeds.start} to {seeds.stop - 1}"
    )
    for outcome, number in outcomes.most_common():
        print(f"{number:9}  {outcome}")


if __name__ == "__main__":
    main()

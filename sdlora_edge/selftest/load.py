"""A device under load, and a device that is killed: every answer must be of one single state."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..device.device import Device
from ..errors import HealthError
from ..results import Result
from .kit import Kit
from .workers import Answers, Told, ask, churn, endless_updates, follow, outcome, program, told

SAME = 1e-5
"""largest difference of a probability, and of a score relative to it, between two runs of one
generation on one machine"""


@dataclass(frozen=True)
class HotSwap(Result):
    """Updates under load. Times of one `predict` of two images."""

    updates: int
    seconds: float
    predictions: int
    generations_seen: int
    generations_seen_by_other_processes: tuple[int, ...]
    failed: int
    mixed: int
    median_ms: float
    longest_ms: float


def hot_swap(kit: Kit, updates: int = 20, threads: int = 2, processes: int = 1) -> HotSwap:
    """Update and roll back while threads and other processes predict all the time.

    Raises HealthError if a prediction fails, or is not of one single generation.
    """
    with kit.store() as store:
        right = _answers_by_task(kit, store)
        device = Device.open(store, threads=1)
        askers = _Askers(device, threads)
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(_Follower(store)) for _ in range(processes)]
            with askers:
                begin = time.perf_counter()
                tasks = _updated(device, kit.chain, updates)
                seconds = time.perf_counter() - begin
            followed = [other.finish() for other in others]
    seen: Answers = sum(followed, askers.seen)
    mixed = sum(
        n for (generation, said), n in seen.items() if not _same(right[tasks[generation]], said)
    )
    if askers.errors or mixed:
        raise HealthError(
            f"under load {len(askers.errors)} predictions failed and {mixed} were of no single "
            f"generation: {askers.errors[:1]}"
        )
    return HotSwap(
        updates=updates,
        seconds=round(seconds, 2),
        predictions=sum(seen.values()),
        generations_seen=_generations(seen),
        generations_seen_by_other_processes=tuple(_generations(answers) for answers in followed),
        failed=0,
        mixed=0,
        median_ms=round(1000 * statistics.median(askers.latencies), 2),
        longest_ms=round(1000 * max(askers.latencies), 2),
    )


def _updated(device: Device, chain: Sequence[Path], updates: int) -> dict[int, int]:
    """The task of each generation that the device goes through."""
    status = device.status()
    tasks = {status.generation: status.task}
    for status in itertools.islice(endless_updates(device, chain), updates):
        tasks[status.generation] = status.task
    return tasks


def _generations(answers: Answers) -> int:
    return len({generation for generation, _ in answers})


class _Askers:
    """Threads that predict all the time, inside a `with` block."""

    def __init__(self, device: Device, threads: int) -> None:
        self.seen: Answers = Counter()
        self.errors: list[str] = []
        self.latencies: list[float] = []
        self._device, self._done = device, threading.Event()
        self._threads = [threading.Thread(target=self._keep_asking) for _ in range(threads)]

    def _keep_asking(self) -> None:
        try:
            while not self._done.is_set():
                begin = time.perf_counter()
                for answer in ask(self._device):
                    self.seen[answer.generation, told(answer)] += 1
                self.latencies.append(time.perf_counter() - begin)
        except Exception as error:
            self.errors.append(repr(error))

    def __enter__(self) -> _Askers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


class _Follower:
    """Another process that predicts all the time, and follows the store."""

    def __init__(self, store: Path) -> None:
        self._process = program(follow, store)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # the store is open

    def finish(self) -> Answers:
        """How often it got each answer. Raises HealthError if it failed."""
        answers = json.loads(outcome(self._process))
        return Counter(
            {
                (generation, (tuple(map(tuple, top)), *rest)): count
                for generation, top, *rest, count in answers
            }
        )

    def __enter__(self) -> _Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _answers_by_task(kit: Kit, store: Path) -> dict[int, list[Told]]:
    """What the device answers in each state without load. It ends in the state it began in."""
    device, found = Device.open(store, threads=1), dict[int, list[Told]]()
    up_and_down = itertools.islice(endless_updates(device, kit.chain), 2 * len(kit.chain))
    # chain is lazy: each answer is asked for before the next update
    for status in itertools.chain([device.status()], up_and_down):
        found[status.task] = [told(answer) for answer in ask(device)]
    if any(
        _same(found[one], said)
        for one, two in itertools.permutations(found, 2)
        for said in found[two]
    ):
        raise HealthError(
            "two states give the same answers, so these packets cannot tell a mixed answer from a "
            "right one: name other packets"
        )
    return found


def _same(right: Sequence[Told], said: Told) -> bool:
    """Whether `said` is one of these: same classes and threshold, same probabilities and score."""
    return any(_alike(one, said) for one in right)


def _alike(one: Told, two: Told) -> bool:
    (top, score, least), (other, other_score, other_least) = one, two
    given, found = dict(top), dict(other)
    return (
        given.keys() == found.keys()
        and all(abs(given[name] - found[name]) <= SAME for name in given)
        and abs(score - other_score) <= SAME * max(1.0, abs(score))
        and least == other_least
    )


@dataclass(frozen=True)
class Kills(Result):
    """A device that was killed again and again. generations: the counter it has reached."""

    kills: int
    generations: int
    longest_open_ms: float


def kill_and_reopen(kit: Kit, kills: int = 5) -> Kills:
    """Kill a process that updates all the time (SIGKILL), and open its store, again and again.

    Raises HealthError unless the store opens each time, and answers as one of its states.
    """
    chance = random.Random(1)  # noqa: S311
    with kit.store() as store:
        right = _answers_by_task(kit, store)
        opened = []
        for _ in range(kills):
            _kill(kit, store, after=chance.uniform(0, 0.5))
            begin = time.perf_counter()
            device = Device.open(store, threads=1)
            opened.append(1000 * (time.perf_counter() - begin))
            task = device.status().task
            if not all(_same(right[task], told(answer)) for answer in ask(device)):
                raise HealthError(
                    f"after a kill the device says task {task}, but answers differently from that "
                    "task"
                )
        _next_update_works(Device.open(store, threads=1), kit)
        generation = device.status().generation
    return Kills(kills, generation, round(max(opened), 1))


def _kill(kit: Kit, store: Path, after: float) -> None:
    """after: seconds."""
    with program(churn, store, *kit.chain) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the store is open
        time.sleep(after)
        ended = process.poll()
        process.kill()
        if ended is not None:
            last = (process.communicate()[1].splitlines() or ["?"])[-1]
            raise HealthError(f"the updating process ended by itself: {last}")


def _next_update_works(device: Device, kit: Kit) -> None:
    held = device.status().packets
    if held == len(kit.chain):
        device.rollback()
    else:
        device.apply(kit.chain[held], allow_older=True)

"""A device at work in a process of its own, which the checks follow, kill and measure.

`selftest` and tests/bench/device.py start these.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..device.answers import Prediction
from ..device.device import Device
from ..device.trial import child
from ..errors import HealthError
from ..results import Result, Status

Top = tuple[tuple[str, float], ...]
"""an answer: (class, probability), best first"""
Told = tuple[Top, float, Optional[float]]
"""all of an answer that depends on the generation: `top`, score, threshold"""
Answers = Counter[tuple[int, Told]]
"""how often each answer of each generation was given"""


def endless_updates(device: Device, chain: Sequence[Path]) -> Iterator[Status]:
    """Status after status: apply the whole chain, roll it back, and again, without end."""
    while True:
        for path in chain:
            yield device.apply(path, allow_older=True)
        for _ in chain:
            yield device.rollback()


def ask(device: Device) -> list[Prediction]:
    """The answers to two images made from a seed, with all classes."""
    images = device.preparation.samples(2)
    return device.predict(images, top=len(device.bundle.state.classes) + 10_000)


def told(answer: Prediction) -> Told:
    """What an answer says."""
    return answer.top, answer.score, answer.threshold


def follow(store: str) -> None:
    """Predict all the time and follow the store, until standard input ends.

    Prints [generation, answer, how often] for every answer.
    """
    device, ended = Device.open(store, threads=1), threading.Event()
    seen: Answers = Counter()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    print("open", flush=True)
    while not ended.is_set():
        device.refresh()
        for answer in ask(device):
            seen[answer.generation, told(answer)] += 1
    print(json.dumps([[generation, *said, count] for (generation, said), count in seen.items()]))


def program(function: Callable[..., None], *arguments: object) -> subprocess.Popen[str]:
    """A process that calls a function of this module with these arguments, as texts.

    Its standard streams are pipes.
    """
    pipe = subprocess.PIPE
    command = child(function, *arguments)
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def outcome(process: subprocess.Popen[str], seconds: float = 600.0) -> str:
    """What a `program` printed until it ended. Raises HealthError if it failed, or took longer."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise HealthError(
            f"a process of this check did not end within {seconds:g} s: try again when this "
            "machine is idle"
        ) from None
    if process.returncode:
        last = (err.strip().splitlines() or ["it printed nothing"])[-1]
        raise HealthError(f"a process of this check ended with {process.returncode}: {last}")
    return out


def churn(store: str, *chain: str) -> None:
    """Update all the time, until killed."""
    device = Device.open(store, threads=1)
    while device.status().packets:
        device.rollback()
    print("open", flush=True)
    for _ in endless_updates(device, [Path(path) for path in chain]):
        pass


@dataclass(frozen=True)
class Cost(Result):
    """A whole life in numbers. Memory is resident bytes of the process, and the peak is that of the
    updates over what was there before them."""

    open_ms: float
    open_to_first_answer_ms: float
    two_images_ms: float
    two_images_ms_longest: float
    two_images_ms_after_all_packets: float
    apply_ms: float
    apply_ms_longest: float
    steady_bytes: int
    peak_over_steady_bytes: int
    weights_bytes: int
    store_bytes: Mapping[str, int]


def lifetime(store: str, seconds: str, *chain: str) -> None:
    """Open, predict, apply every packet, predict. Prints a `Cost` as JSON."""
    begin = time.perf_counter()
    device = Device.open(store)
    opened = time.perf_counter()
    ask(device)
    first = time.perf_counter()
    before, steady = latencies(device, float(seconds)), memory().now
    forget_peak()
    applied = [device.apply(path) for path in chain]
    peak = memory().peak
    spent = [status.apply_ms for status in applied]
    cost = Cost(
        open_ms=round(1000 * (opened - begin), 2),
        open_to_first_answer_ms=round(1000 * (first - begin), 2),
        two_images_ms=round(statistics.median(before), 2),
        two_images_ms_longest=round(max(before), 2),
        two_images_ms_after_all_packets=round(
            statistics.median(latencies(device, float(seconds))), 2
        ),
        apply_ms=round(statistics.median(spent), 2),
        apply_ms_longest=round(max(spent), 2),
        steady_bytes=steady,
        peak_over_steady_bytes=peak - steady,
        weights_bytes=sum(array.nbytes for array in device.current()[1].values()),
        store_bytes=dict(applied[-1].store_bytes),
    )
    print(json.dumps(cost.to_dict()))


def latencies(device: Device, seconds: float) -> list[float]:
    """Milliseconds of each `predict`, for so many seconds, and of one at least."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        ask(device)
        found.append(1000 * (time.perf_counter() - begin))
    return found


@dataclass(frozen=True)
class Resident:
    """Resident bytes of a process, now and at the highest since `forget_peak`."""

    now: int
    peak: int


def memory() -> Resident:
    """Of this process. Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return Resident(now, peak)


def forget_peak() -> None:
    """Start the peak again at what is resident now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")

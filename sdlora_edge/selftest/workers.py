"""A device at work: what `selftest` and tests/bench/device.py run in processes of their own, to be followed, killed and measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..device.answers import Prediction
from ..device.device import Device
from ..device.trial import child
from ..errors import HealthError
from ..results import Status


def endless_updates(device: Device, chain: Sequence[Path]) -> Iterator[Status]:
    """Update after update, without end: up the chain, down again."""
    while True:
        for path in chain:
            yield device.apply(path, allow_older=True)
        for _ in chain:
            yield device.rollback()


def ask(device: Device) -> list[Prediction]:
    """Images made from a seed, and all there is to say about them."""
    random = np.random.default_rng(0)
    images = list(random.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8))
    return device.predict(images, top=len(device.bundle.state.classes) + 10_000)


def follow(store: str) -> None:
    """Ask all the time and follow the store, until its standard input ends: prints [generation, answer, how often] of every answer."""
    device, seen, ended = (
        Device.open(store, threads=1),
        Counter[tuple[int, tuple[Any, ...]]](),
        threading.Event(),
    )

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    print("open", flush=True)
    while not ended.is_set():
        device.refresh()
        for answer in ask(device):
            seen[answer.generation, answer.top] += 1
    print(json.dumps([[generation, top, count] for (generation, top), count in seen.items()]))


def program(function: Callable[..., None], *arguments: object) -> subprocess.Popen[str]:
    """A process that calls a function of this module with these arguments, as texts; its standard streams are pipes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(child(function, *arguments), text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def outcome(process: subprocess.Popen[str], seconds: float = 600.0) -> str:
    """What a `program` printed, once it has ended. Raises HealthError where it needs longer, or fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise HealthError(
            f"a process of this check did not end within {seconds:g} s: try again when this machine is idle"
        ) from None
    if process.returncode:
        last = (err.strip().splitlines() or ["it printed nothing"])[-1]
        raise HealthError(f"a process of this check ended with {process.returncode}: {last}")
    return out


def churn(store: str, *chain: str) -> None:
    """Update all the time, until it is killed."""
    device = Device.open(store, threads=1)
    while device.status().packets:
        device.rollback()
    print("open", flush=True)
    for _ in endless_updates(device, [Path(path) for path in chain]):
        pass


def lifetime(store: str, seconds: str, *chain: str) -> None:
    """Open, ask, apply every packet, ask: prints times and memory as JSON. Memory is resident bytes; the peak is that of the updates over what was there before."""
    begin = time.perf_counter()
    device = Device.open(store)
    opened = time.perf_counter()
    ask(device)
    first = time.perf_counter()
    before, steady = latencies(device, float(seconds)), memory()["now"]
    forget_peak()
    applied = [device.apply(path) for path in chain]
    peak = memory()["peak"]
    values = {
        "open_ms": 1000 * (opened - begin),
        "open_to_first_answer_ms": 1000 * (first - begin),
        "two_images_ms": statistics.median(before),
        "two_images_ms_longest": max(before),
        "two_images_ms_after_all_packets": statistics.median(latencies(device, float(seconds))),
        "apply_ms": statistics.median(status.apply_ms for status in applied),
        "apply_ms_longest": max(status.apply_ms for status in applied),
        "steady_bytes": steady,
        "peak_over_steady_bytes": peak - steady,
        "weights_bytes": sum(array.nbytes for array in device.current()[1].values()),
        "store_bytes": dict(applied[-1].store_bytes),
    }
    print(
        json.dumps(
            {
                key: round(value, 2) if isinstance(value, float) else value
                for key, value in values.items()
            }
        )
    )


def latencies(device: Device, seconds: float) -> list[float]:
    """Milliseconds of one `predict` after the other."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        begin = time.perf_counter()
        ask(device)
        found.append(1000 * (time.perf_counter() - begin))
    return found


def memory() -> dict[str, int]:
    """Resident bytes of this process: {"now", "peak"}; the peak since `forget_peak`. Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        key: 1024 * int(lines[name].split()[0])
        for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def forget_peak() -> None:
    """The peak begins anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")

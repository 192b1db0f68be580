"""The agent under load: ViT-Tiny, 50 requests a second over HTTP on this machine, 100 updates one after the other.

    cold start        from the start of the process to the first answer; the median of five
    in process        `Device.predict` of the same JPEG at the same rate, without and with updates: what HTTP is compared with
    updates           one packet after the other into the watched folder, each as soon as the one before is in force
    failed            requests without an answer of status 200
    mixed             answers whose classes are not those of the generation that they name
    latency           from the time when a request was due, so that a stall counts for all that had to wait
    memory            resident, and its growth over --minutes of load without updates, after the updates

The run is random (`random_runs`). The agent is told to stay within 170 MB: it refuses less than 151.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import device as device_bench
import figures
import numpy as np
from PIL import Image

from sdlora_edge.device import Device
from sdlora_edge.device.device import IN_PLACE

MODEL, NEW, THREADS, MEMORY = "vit_tiny_patch16_224", 1, 2, 170
CLIENTS = 16
BUILD = figures.ROOT / "build" / "agent"


def photo() -> bytes:
    """A JPEG of 640 x 480 pixels."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@dataclass
class Measured:
    """Answers at a steady rate. ms: latency of each. answers: (generation, classes) of each."""

    ms: list[float] = field(default_factory=list)
    answers: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return round(float(np.percentile(self.ms, 100 * share)), 2)


Ask = Callable[[], tuple[int, frozenset[str]]]


def steadily(ask: Ask, rate: float, done: threading.Event) -> Measured:
    """Ask at this rate until `done`, whether answers come or not."""
    found, begin = Measured(), time.perf_counter()

    def one(due: float) -> None:
        try:
            answer = ask()
        except Exception as error:
            found.failed.append(repr(error))
            return
        found.ms.append(1000 * (time.perf_counter() - due))
        found.answers.append(answer)

    with ThreadPoolExecutor(CLIENTS) as pool:
        count = 0
        while not done.is_set():
            due = begin + count / rate
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            pool.submit(one, due)
            count += 1
    return found


class Http:
    """Asks an agent, on one connection for each thread."""

    def __init__(self, host: str, image: bytes) -> None:
        self._host, self._image, self._own = host, image, threading.local()

    def __call__(self) -> tuple[int, frozenset[str]]:
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection(self._host, timeout=60)
        connection = self._own.connection
        try:
            connection.request("POST", "/v1/predict?top=100000", self._image)
            answer = connection.getresponse()
            data = answer.read()
        except Exception:
            connection.close()
            raise
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {data[:200]!r}")
        (one,) = json.loads(data)["predictions"]
        return one["generation"], frozenset(top["class"] for top in one["top"])


def in_process(device: Device, image: bytes) -> Ask:
    def ask() -> tuple[int, frozenset[str]]:
        one = device.predict(image, top=100_000)
        return one.generation, frozenset(name for name, _ in one.top)

    return ask


@contextlib.contextmanager
def agent(store: Path, incoming: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, host and port) of an agent that watches a folder."""
    command = [sys.executable, "-m", "sdlora_edge", "device", "run", "--store", str(store)]
    command += ["--watch", str(incoming), "--every", "0.1", "--listen", "127.0.0.1:0"]
    command += ["--memory-limit", str(MEMORY), "--threads", str(THREADS)]
    log = (store.parent / "agent.log").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip().rpartition("/")[2]
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(f"the agent ended with {process.returncode}: see {log.name}")
    finally:
        process.kill()
        log.close()


def cold_start(store: Path, incoming: Path, image: bytes) -> float:
    """Seconds to the first answer."""
    begin = time.perf_counter()
    with agent(store, incoming) as (_, host):
        ask = Http(host, image)
        while True:
            with contextlib.suppress(RuntimeError):  # 503: the model is being opened
                ask()
                return time.perf_counter() - begin
            time.sleep(0.005)


def task_of(host: str) -> int:
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request("GET", "/healthz")
        return int(json.loads(connection.getresponse().read())["task"])


def resident(process: subprocess.Popen[str]) -> float:
    """MB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


@contextlib.contextmanager
def load(ask: Ask, rate: float) -> Iterator[list[Measured]]:
    """Load while the block runs; then the list holds what was measured."""
    done, found = threading.Event(), list[Measured]()
    thread = threading.Thread(target=lambda: found.append(steadily(ask, rate, done)))
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def fresh(folder: Path, name: str) -> Path:
    shutil.rmtree(folder / name, ignore_errors=True)
    Device.init(folder / "bundle", folder / name)
    return folder / name


def classes_of(folder: Path, packets: list[Path]) -> dict[int, frozenset[str]]:
    """{generation: its classes}"""
    device = Device.open(fresh(folder, "known"), swap=IN_PLACE)
    statuses = [device.status(), *(device.apply(packet) for packet in packets)]
    return {status.generation: frozenset(status.classes) for status in statuses}


def measured(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    image, packets = photo(), device_bench.chain(folder)[: given.updates]
    known = classes_of(folder, packets)
    incoming = folder / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    store = fresh(folder, "store")
    starts = [cold_start(store, incoming, image) for _ in range(given.starts)]
    alone = Device.open(fresh(folder, "alone"), THREADS)
    with load(in_process(alone, image), given.rate) as before:
        time.sleep(given.seconds)
    with load(in_process(alone, image), given.rate) as beside:
        for packet in packets:
            alone.apply(packet)
    with agent(store, incoming) as (process, host):
        ask = Http(host, image)
        while task_of_ready(host) is None:
            time.sleep(0.05)
        with load(ask, given.rate) as quiet:
            time.sleep(given.seconds)
        with load(ask, given.rate) as updated:
            for number, packet in enumerate(packets, 1):
                shutil.copy(packet, incoming / f".{packet.name}")
                (incoming / f".{packet.name}").rename(incoming / packet.name)
                while task_of(host) < number:
                    time.sleep(0.02)
            time.sleep(1)
        with load(ask, given.rate) as long:
            time.sleep(min(30, 30 * given.minutes))
            first = resident(process)
            time.sleep(60 * given.minutes)
            last = resident(process)
    all_found = [found for (found,) in (quiet, updated, long)]
    failed = [error for found in all_found for error in found.failed]
    for error in failed[:5]:
        print(error, file=sys.stderr)
    answers = [answer for found in all_found for answer in found.answers]
    return {
        "updates": len(packets),
        "requests_per_s": given.rate,
        "requests": len(answers) + len(failed),
        "failed": len(failed),
        "mixed": sum(known[generation] != classes for generation, classes in answers),
        "generations_seen": len({generation for generation, _ in answers}),
        "p50_ms": updated[0].percentile(0.5),
        "p99_ms": updated[0].percentile(0.99),
        "p50_quiet_ms": quiet[0].percentile(0.5),
        "p99_quiet_ms": quiet[0].percentile(0.99),
        "p50_in_process_ms": beside[0].percentile(0.5),
        "p99_in_process_ms": beside[0].percentile(0.99),
        "p50_in_process_quiet_ms": before[0].percentile(0.5),
        "p99_in_process_quiet_ms": before[0].percentile(0.99),
        "rss_mb": round(last, 1),
        "rss_growth_mb": round(last - first, 1),
        "minutes": given.minutes,
        "cold_start_s": round(statistics.median(starts), 2),
        "image_size": given.size,
        "threads": THREADS,
        "memory_limit_mb": MEMORY,
    }


def task_of_ready(host: str) -> int | None:
    """None while no model is served."""
    with contextlib.suppress(KeyError):
        return task_of(host)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--minutes", type=float, default=10, help="of load while memory is watched")
    parser.add_argument("--seconds", type=float, default=20, help="of load without updates")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the model's input")
    parser.add_argument("--out", type=Path, default=figures.FIGURES, help="folder for agent.json")
    given = parser.parse_args()
    folder = BUILD / f"{given.size}-{given.updates}"
    if not (folder / "done").exists():
        device_bench.TASKS, device_bench.NEW = given.updates, NEW
        device_bench.make(folder, MODEL, "onnx", device_bench.INPUTS, given.size)
    values = measured(folder, given)
    packages = ("onnxruntime", "numpy", "starlette", "uvicorn")
    options = " ".join(sys.argv[1:])
    command = f"python tests/bench/agent.py {options}" if options else "make bench-agent"
    print(figures.write("agent", command, values, given.out, packages))


if __name__ == "__main__":
    main()

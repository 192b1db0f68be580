"""Does this very device do what was promised? The checks of `device selftest`, which device_tests/ runs under pytest.

Each check takes a `Kit` and returns what it measured, as plain values; it raises HealthError where a promise is not kept.
A device needs nothing for it but the core install, the bundle, its packets, and (for `parity`) what the host answers, recorded
with `sdlora-edge expect`. A scratch store is used; the device's own is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..device.device import Device
from ..errors import HealthError, InputError, SdloraError
from ..formats import packet
from ..formats.bundle import Bundle, open_bundle
from ..formats.canonical import parse_json, sha256
from ..inputs import canary
from ..inputs.image import Preprocessing
from ..storage import atomic
from .workers import ask, churn, endless_updates, follow, lifetime, outcome, program

EXPECTED, EXPECTED_FORMAT = "expected.json", "sdlora-edge/expected/1"
PACKAGES = (
    "sdlora-edge",
    "numpy",
    "pillow",
    "onnxruntime",
    "executorch",
    "safetensors",
    "securesystemslib",
    "cryptography",
)
SAME = 1e-5
"""largest difference of a probability between two runs of one generation on one machine"""


@dataclass(frozen=True)
class Kit:
    """What the checks work on. chain: packets that follow from the bundle, in order. scratch: a folder of its own.

    expected: a folder made by `sdlora-edge expect`, or None.
    """

    bundle: Path
    chain: tuple[Path, ...]
    scratch: Path
    expected: Path | None = None

    @contextlib.contextmanager
    def store(self) -> Iterator[Path]:
        """A fresh store of the bundle, removed afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            Device.init(self.bundle, Path(folder) / "store")
            yield Path(folder) / "store"


@contextlib.contextmanager
def open_kit(
    bundle: Path, packets: Path, expected: Path | None = None, scratch: Path | None = None
) -> Iterator[Kit]:
    """scratch: a folder on the disk that stores lie on, made if it is missing; by default where temporary files go.

    Raises InputError for a damaged bundle or record of what is expected, or where no packet in the folder follows from it; StorageError for a scratch folder
    that cannot be written.
    """
    if expected is not None:
        _read_expected(expected)
    chain = _chain(open_bundle(bundle), packets)
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="sdlora-edge-", dir=scratch)
    except OSError as error:
        raise atomic.unwritten(scratch or Path("the temporary folder"), error) from error
    with made as folder:
        yield Kit(bundle, chain, Path(folder), expected)


def _chain(bundle: Bundle, folder: Path) -> tuple[Path, ...]:
    """Packets that lead from the bundle's state on, one after the other; those of other kinds and keys are left out."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob(f"*{packet.SUFFIX}")):
        with contextlib.suppress(SdloraError):
            one = packet.read(atomic.read(path, packet.LIMITS.packet), bundle.trust)
            if one.lineage == bundle.manifest.lineage:
                found.setdefault(one.begin, (one.end, path))
    state, chain = bundle.manifest.state, []
    while state in found:
        state, path = found.pop(state)
        chain.append(path)
    if not chain:
        raise InputError(
            f"{folder} holds no packet that this bundle trusts and that follows from its task {bundle.manifest.task}"
        )
    return tuple(chain)


def environment(kit: Kit) -> dict[str, Any]:
    """What this device is."""
    manifest = open_bundle(kit.bundle).manifest
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions,
        "model": manifest.model,
        "target": manifest.target,
        "precision": manifest.precision,
        "task": manifest.task,
        "packets": len(kit.chain),
    }


def signatures(kit: Kit) -> dict[str, Any]:
    """How long verifying takes: signatures, digest and tensors of each packet."""
    trust, spent, sizes = open_bundle(kit.bundle).trust, [], []
    for path in kit.chain:
        data = atomic.read(path, packet.LIMITS.packet)
        begin = time.perf_counter()
        packet.read(data, trust)
        spent.append(1000 * (time.perf_counter() - begin))
        sizes.append(len(data))
    return {
        "packets": len(spent),
        "largest_bytes": max(sizes),
        "verify_ms": round(statistics.median(spent), 2),
    }


def parity(kit: Kit) -> dict[str, Any]:
    """The canary of every state, and the host's logits for the images in `expected`, which are decoded and prepared here."""
    known = _read_expected(kit.expected) if kit.expected else {"images": {}, "states": {}}
    bound = open_bundle(kit.bundle).manifest.tolerance
    worst, answers, same, states, canaries = 0.0, 0, 0, 0, []
    with kit.store() as store:
        device = Device.open(store)
        prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
        inputs: Any = (
            prepare.normalise(
                np.stack([prepare.pixels(kit.expected / name) for name in known["images"]])
            )
            if kit.expected
            else []
        )
        for path in (None, *kit.chain):
            if path is not None:
                canaries.append(device.apply(path).canary_difference)
            recorded = known["states"].get(device.status().state)
            if recorded is None:
                continue
            states += 1
            wanted = np.array(recorded["logits"], np.float32)
            logits = np.concatenate([device.logits(one[None]) for one in inputs])
            worst = max(worst, canary.largest_difference(logits, wanted))
            answers += len(wanted)
            same += int((logits.argmax(axis=1) == wanted.argmax(axis=1)).sum())
    if kit.expected and not states:
        raise HealthError(
            f"{kit.expected} was recorded for other states than these packets lead to: record it again from this run"
        )
    if not worst <= bound:
        raise HealthError(
            f"logits differ from the host's by {worst:.2g}, more than {bound:g} ({same} of {answers} answers equal)"
        )
    return {
        "canaries": len(canaries),
        "largest_canary_difference": max(canaries, key=lambda found: found or 0.0),
        "images": len(known["images"]),
        "states": states,
        "answers": answers,
        "same_answers": same,
        "largest_difference": worst,
        "tolerance": bound,
    }


def _read_expected(folder: Path) -> dict[str, Any]:
    known = parse_json(atomic.read(folder / EXPECTED), EXPECTED)
    if known.get("format") != EXPECTED_FORMAT:
        raise InputError(
            f"{folder / EXPECTED} is not of format {EXPECTED_FORMAT}: record it again with sdlora-edge expect"
        )
    for name, digest in known["images"].items():
        if sha256(atomic.read(folder / name)) != digest:
            raise InputError(
                f"{folder / name} is not the image that was recorded: copy the folder again"
            )
    return known


def hot_swap(kit: Kit, updates: int = 20, threads: int = 2, processes: int = 1) -> dict[str, Any]:
    """Updates and rollbacks while threads and other processes ask all the time: no answer fails, each is of one generation."""
    seen: Counter[tuple[int, tuple[Any, ...]]] = Counter()
    errors: list[str] = []
    latencies: list[float] = []
    done = threading.Event()
    with kit.store() as store:
        right = _answers_by_task(kit, store)
        device = Device.open(store, threads=1)
        tasks = {device.status().generation: device.status().task}

        def keep_asking() -> None:
            try:
                while not done.is_set():
                    begin = time.perf_counter()
                    for answer in ask(device):
                        seen[answer.generation, answer.top] += 1
                    latencies.append(time.perf_counter() - begin)
            except Exception as error:
                errors.append(repr(error))

        askers = [threading.Thread(target=keep_asking) for _ in range(threads)]
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(_Follower(store)) for _ in range(processes)]
            for asker in askers:
                asker.start()
            begin = time.perf_counter()
            try:
                for status in itertools.islice(endless_updates(device, kit.chain), updates):
                    tasks[status.generation] = status.task
                seconds = time.perf_counter() - begin
            finally:
                done.set()
                for asker in askers:
                    asker.join()
            followed = [other.finish() for other in others]
    for answers in followed:
        seen.update(answers)
    mixed = sum(
        count
        for (generation, top), count in seen.items()
        if not _same(right[tasks[generation]], top)
    )
    generations = [len({generation for generation, _ in answers}) for answers in followed]
    if errors or mixed:
        raise HealthError(
            f"under load {len(errors)} predictions failed and {mixed} were of no single generation: {errors[:1]}"
        )
    return {
        "updates": updates,
        "seconds": round(seconds, 2),
        "predictions": sum(seen.values()),
        "generations_seen": len({generation for generation, _ in seen}),
        "generations_seen_by_other_processes": generations,
        "failed": 0,
        "mixed": 0,
        "median_ms": round(1000 * statistics.median(latencies), 2),
        "longest_ms": round(1000 * max(latencies), 2),
    }


def _answers_by_task(kit: Kit, store: Path) -> dict[int, list[tuple[tuple[str, float], ...]]]:
    """What the device answers in each state, asked in peace; it ends in the state it began in."""
    device, found = Device.open(store, threads=1), {}
    up_and_down = itertools.islice(endless_updates(device, kit.chain), 2 * len(kit.chain))
    for status in itertools.chain([device.status()], up_and_down):  # lazily: an answer after each
        found[status.task] = [answer.top for answer in ask(device)]
    if any(
        _same(found[one], top)
        for one, two in itertools.permutations(found, 2)
        for top in found[two]
    ):
        raise HealthError(
            "two states give the same answers: these packets cannot tell a mixed answer from a right one"
        )
    return found


def _same(
    right: Sequence[tuple[tuple[str, float], ...]], top: tuple[tuple[str, float], ...]
) -> bool:
    """Whether `top` is one of these answers: the same classes, with the same probabilities."""
    given = dict(top)
    return any(
        given.keys() == (one := dict(r)).keys() and all(abs(given[c] - one[c]) <= SAME for c in one)
        for r in right
    )


class _Follower:
    """Another process that asks all the time, and follows the store."""

    def __init__(self, store: Path) -> None:
        self._process = program(follow, store)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it is open

    def finish(self) -> Counter[tuple[int, tuple[Any, ...]]]:
        """Its answers, how often each. Raises HealthError where it failed."""
        answers = json.loads(outcome(self._process))
        return Counter(
            {(generation, tuple(map(tuple, top))): count for generation, top, count in answers}
        )

    def __enter__(self) -> _Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def kill_and_reopen(kit: Kit, kills: int = 5) -> dict[str, Any]:
    """A process that updates all the time is killed (SIGKILL), over and over: the store opens, and answers as one of its states."""
    chance, found = random.Random(1), list[float]()  # noqa: S311
    with kit.store() as store:
        right = _answers_by_task(kit, store)
        for _ in range(kills):
            with program(churn, store, *kit.chain) as process:
                assert process.stdout is not None
                process.stdout.readline()  # it is open
                time.sleep(chance.uniform(0, 0.5))
                stopped = process.poll()
                process.kill()
                if stopped is not None:
                    raise HealthError(
                        f"it ended by itself: {(process.communicate()[1].splitlines() or ['?'])[-1]}"
                    )
            begin = time.perf_counter()
            device = Device.open(store, threads=1)
            found.append(1000 * (time.perf_counter() - begin))
            task = device.status().task
            if not all(_same(right[task], answer.top) for answer in ask(device)):
                raise HealthError(
                    f"after a kill the device says task {task}, and does not answer as that task does"
                )
        _next_update_works(Device.open(store, threads=1), kit)
        generation = device.status().generation
    return {"kills": kills, "generations": generation, "longest_open_ms": round(max(found), 1)}


def _next_update_works(device: Device, kit: Kit) -> None:
    held = device.status().packets
    device.rollback() if held == len(kit.chain) else device.apply(kit.chain[held], allow_older=True)


def cost(kit: Kit, seconds: float = 1.0) -> dict[str, Any]:
    """Times and memory of a whole life: open, predict, apply every packet, predict; in a process of its own."""
    with kit.store() as store:
        return dict(json.loads(outcome(program(lifetime, store, seconds, *kit.chain))))


CHECKS: dict[str, Callable[[Kit], dict[str, Any]]] = {
    check.__name__: check
    for check in (environment, signatures, parity, hot_swap, kill_and_reopen, cost)
}


class Report:
    """What a person sends back: {"time", "passed", "checks": {name: {"passed", "seconds", and what was measured, or "error"}}}."""

    def __init__(self) -> None:
        self._checks: dict[str, dict[str, Any]] = {}

    def check(self, name: str, kit: Kit) -> None:
        """Run one check, and keep what it found. Raises what the check raises."""
        begin, found = time.perf_counter(), dict[str, Any](passed=False)
        try:
            found = {"passed": True, **CHECKS[name](kit)}
        except Exception as error:
            found["error"] = str(error) if isinstance(error, SdloraError) else repr(error)
            raise
        finally:
            self._checks[name] = {**found, "seconds": round(time.perf_counter() - begin, 2)}

    def value(self) -> dict[str, Any]:
        """`passed` is for all of CHECKS: a report that is written between two of them has not passed."""
        passed = self._checks.keys() == CHECKS.keys() and all(
            check["passed"] for check in self._checks.values()
        )
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "passed": passed,
            "checks": self._checks,
        }

    def write(self, path: Path) -> None:
        atomic.write(path, json.dumps(self.value(), indent=1).encode() + b"\n")

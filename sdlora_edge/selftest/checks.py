"""Does this very device do what was promised? The checks of `device selftest` and device_tests/.

Each check takes a `Kit`, and returns what it measured. It raises HealthError if a promise is not
kept. A device needs only the core install, the bundle, its packets, and, for `parity`, what the
host answers, recorded with `sdlora-edge expect`. The checks use scratch stores, never the device's
own.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..device.answers import Asked, Prediction
from ..device.device import Device
from ..errors import HealthError, SdloraError
from ..formats import packet
from ..formats.bundle import open_bundle
from ..inputs import canary
from ..inputs.modality import Inputs, Preparation, count, preparation, rows
from ..results import Result
from ..storage import atomic
from .kit import Expected, Kit
from .load import hot_swap, kill_and_reopen
from .workers import Cost, lifetime, outcome, program

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


@dataclass(frozen=True)
class Environment(Result):
    """What this device is. task: the bundle's."""

    system: str
    machine: str
    python: str
    cores: int | None
    memory_bytes: int
    versions: Mapping[str, str]
    model: str
    target: str
    precision: str
    task: int
    packets: int


def environment(kit: Kit) -> Environment:
    """What this device is, and which bundle it tries."""
    manifest = open_bundle(kit.bundle).manifest
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Environment(
        system=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions=versions,
        model=manifest.model,
        target=manifest.target,
        precision=manifest.precision,
        task=manifest.task,
        packets=len(kit.chain),
    )


@dataclass(frozen=True)
class Signatures(Result):
    """verify_ms: median over the packets."""

    packets: int
    largest_bytes: int
    verify_ms: float


def signatures(kit: Kit) -> Signatures:
    """Measure how long verifying takes: signatures, digest and tensors of each packet."""
    trust, spent, sizes = open_bundle(kit.bundle).trust, [], []
    for path in kit.chain:
        data = atomic.read(path, packet.LIMITS.packet)
        begin = time.perf_counter()
        packet.read(data, trust)
        spent.append(1000 * (time.perf_counter() - begin))
        sizes.append(len(data))
    return Signatures(len(spent), max(sizes), round(statistics.median(spent), 2))


@dataclass(frozen=True)
class HostParity(Result):
    """How far this device is from the host, in logits. answers: images times states."""

    canaries: int
    largest_canary_difference: float
    images: int
    states: int
    answers: int
    same_answers: int
    largest_difference: float
    tolerance: float


def parity(kit: Kit) -> HostParity:
    """Compare this device with the host: the canary of every state, and logits of real images.

    The images are those of `kit.expected`. They are decoded and prepared here.

    Raises HealthError if logits differ by more than the bundle's tolerance.
    """
    known = Expected.read(kit.expected) if kit.expected else Expected((), {})
    bound = open_bundle(kit.bundle).manifest.tolerance
    with kit.store() as store:
        canaries, compared = _followed(Device.open(store), kit.chain, known)
    if kit.expected and not compared:
        raise HealthError(
            f"{kit.expected} was recorded for other states than these packets lead to: record it "
            "again from this run"
        )
    worst = max((canary.largest_difference(ours, host) for ours, host in compared), default=0.0)
    same = sum(int((ours.argmax(1) == host.argmax(1)).sum()) for ours, host in compared)
    answers = sum(len(host) for _, host in compared)
    if not worst <= bound:
        raise HealthError(
            f"logits differ from the host's by {worst:.2g}, more than {bound:g} "
            f"({same} of {answers} answers equal)"
        )
    return HostParity(
        canaries=len(canaries),
        largest_canary_difference=max(canaries, default=0.0),
        images=len(known.images),
        states=len(compared),
        answers=answers,
        same_answers=same,
        largest_difference=worst,
        tolerance=bound,
    )


def _followed(
    device: Device, chain: Sequence[Path], known: Expected
) -> tuple[list[float], list[tuple[np.ndarray, np.ndarray]]]:
    """Canary differences, and (logits here, logits of the host) of every state that is known."""
    canaries, compared = list[float](), list[tuple[np.ndarray, np.ndarray]]()
    inputs = _prepared(device, known)
    for path in (None, *chain):
        if path is not None and (found := device.apply(path).canary_difference) is not None:
            canaries.append(found)
        if (wanted := known.logits.get(device.status().state)) is not None:
            # one image at a time, as a camera hands them over
            alone = (rows(inputs, slice(i, i + 1)) for i in range(count(inputs)))
            compared.append((np.concatenate([*map(device.logits, alone)]), wanted))
    return canaries, compared


def _prepared(device: Device, known: Expected) -> Inputs:
    """What the model reads of the images that the host has answered."""
    prepare = _preparation(device)
    return prepare.arrays(prepare.stacked([*map(prepare.item, known.images)]))


def _preparation(device: Device) -> Preparation:
    return preparation(device.bundle.manifest.preprocessing, device.bundle.path)


@dataclass(frozen=True)
class Strangeness(Result):
    """Images that show nothing, over all states. answers: images times states that tell unknown."""

    states: int
    states_that_tell_unknown: int
    answers: int


def unknown(kit: Kit) -> Strangeness:
    """Ask for images that show nothing, in every state that tells unknown: see `Preparation.blank`.

    Raises HealthError if one of them is known.
    """
    told, wrong = list[bool](), list[str]()
    with kit.store() as store:
        device = Device.open(store)
        prepare = _preparation(device)
        items = {
            f"{kind} {i}": item
            for kind, own in prepare.blank(each=3, seed=1).items()
            for i, item in enumerate(own, 1)
        }
        for path in (None, *kit.chain):
            status = device.status() if path is None else device.apply(path)
            told.append(status.threshold is not None)
            if told[-1]:
                wrong += [
                    f"{prepare.noun} {name!r} is {answer.label} in task {status.task} "
                    f"(score {answer.score:.4g}, threshold {answer.threshold:.4g})"
                    for name, answer in _answers(device, items)
                    if answer.known
                ]
    if wrong:
        raise HealthError(
            f"{len(wrong)} of {sum(told) * len(items)} {prepare.noun}s that show nothing are "
            f"known: {wrong[0]}: predict with a higher --threshold, "
            "unless a class of yours looks like this"
        )
    return Strangeness(len(told), sum(told), sum(told) * len(items))


def _answers(device: Device, items: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Prediction]]:
    """What a device answers to prepared items, by name. Raises HealthError."""
    answers = device.answer_prepared([*items.values()], Asked())
    for name, answer in zip(items, answers, strict=True):
        if isinstance(answer, HealthError):
            raise answer
        yield name, answer.prediction


def cost(kit: Kit, seconds: float = 1.0) -> Cost:
    """Measure times and memory of a whole life, in a process of its own.

    It opens the store, predicts, applies every packet, and predicts. seconds: for each measurement
    of predictions.
    """
    with kit.store() as store:
        return Cost(**json.loads(outcome(program(lifetime, store, seconds, *kit.chain))))


CHECKS: dict[str, Callable[[Kit], Result]] = {
    check.__name__: check
    for check in (environment, signatures, parity, unknown, hot_swap, kill_and_reopen, cost)
}


@dataclass(frozen=True)
class CheckOutcome(Result):
    """What one check found, or the error that it ended with."""

    passed: bool
    seconds: float
    found: Result | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """One level: what was found stands beside `passed`."""
        found = self.found.to_dict() if self.found else {}
        error = {} if self.error is None else {"error": self.error}
        return {"passed": self.passed, **found, **error, "seconds": self.seconds}


@dataclass(frozen=True)
class SelftestReport(Result):
    """What a person sends back. passed: all checks have run, and passed."""

    time: str
    passed: bool
    checks: Mapping[str, CheckOutcome]

    def write(self, path: Path) -> None:
        """Raises StorageError."""
        atomic.write(path, json.dumps(self.to_dict(), indent=1).encode() + b"\n")


@dataclass
class Report:
    """Collects what the checks find, one after the other."""

    checks: dict[str, CheckOutcome] = field(default_factory=dict)

    def check(self, name: str, kit: Kit) -> None:
        """Run one check, and keep what it found. Raises what the check raises."""
        begin, found, problem = time.perf_counter(), None, None
        try:
            found = CHECKS[name](kit)
        except Exception as error:
            problem = str(error) if isinstance(error, SdloraError) else repr(error)
            raise
        finally:  # also if somebody pressed Ctrl-C: then without result and error
            spent = round(time.perf_counter() - begin, 2)
            self.checks[name] = CheckOutcome(found is not None, spent, found, problem)

    def value(self) -> SelftestReport:
        """The report so far. It has not passed before all of CHECKS have."""
        passed = self.checks.keys() == CHECKS.keys() and all(
            check.passed for check in self.checks.values()
        )
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return SelftestReport(now, passed, dict(self.checks))


def run(kit: Kit, keep: Callable[[SelftestReport], None]) -> SelftestReport:
    """Run all checks, whatever each of them meets.

    Args:
        kit: what to try.
        keep: gets the report before the first check and after each one. If it raises, the run ends.
    """
    report = Report()
    keep(so_far := report.value())  # before checks that take minutes: nobody may be able to write
    for name in CHECKS:
        try:
            with contextlib.suppress(Exception):  # the report holds it, and the other checks go on
                report.check(name, kit)
        finally:
            keep(so_far := report.value())
    return so_far

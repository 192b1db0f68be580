"""Give the reader changed packets: python tests/attacks/fuzz.py --count 200000

Coverage guides it: a changed packet that runs a new line of the reader is changed further. Every
packet must end in a typed error, or be verified and be exactly what was signed, within bounds of
memory and time. The first one that does not is written to --save and ends the run.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors.numpy
from forge import Draft
from mutations import mutate

from sdlora_edge.acceptance import Standing, accept_update
from sdlora_edge.errors import InputError, SdloraError
from sdlora_edge.formats import container, control, packet, signing
from sdlora_edge.formats.bundle import Bundle, open_bundle
from sdlora_edge.formats.canonical import to_units
from sdlora_edge.formats.packet import Packet
from sdlora_edge.state import UNUSED, TaskState, extended, merge

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
READER = {
    "acceptance.py",
    "canonical.py",
    "container.py",
    "encoding.py",
    "control.py",
    "lead.py",
    "limits.py",
    "packet.py",
    "signing.py",
    "state.py",
}
SECONDS = 2.0
"""of the processor's time that a packet may take"""
TRACED_EVERY = 64
"""one packet in so many has its memory measured"""


def memory_bound(size: int) -> int:
    """Bytes that reading a packet of `size` bytes may need beside it."""
    return 4 * 2**20 + 64 * size


@dataclass
class Case:
    """A packet, and the payloads that the keys have signed and that may be verified out of it."""

    data: bytes
    signed: frozenset[bytes]


@dataclass
class Fuzzer:
    """The device is before task 1 or 2, and both keys of `signers` must sign."""

    seed: int = 0
    lines: set[tuple[str, int]] = field(default_factory=set)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0
    largest: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)  # noqa: S311
        with tempfile.TemporaryDirectory() as folder:
            pairs = [signing.new_key(name, Path(folder)) for name in "ab"]
            self.signers = [signing.load_signer(private) for private, _ in pairs]
        self.trust = signing.Trust(tuple(s.public_key for s in self.signers), 2)
        self.bundle: Bundle = open_bundle(VECTORS / "bundles" / "fp16")
        self.corpus = list(self._seeds())
        self.seeds = len(self.corpus)
        self.states = [self.bundle.state]
        first = control.read_any(self.corpus[0].data, self.trust)
        assert isinstance(first, Packet)
        self.states.append(self._checked(first, self.bundle.state))

    def _seeds(self) -> Iterator[Case]:
        names = ("1", "2", "squash", "int8-1", "int4-1", "changes-1", "revocation", "keys")
        drafts = [Draft(VECTORS / "packets" / f"{name}.sdlora") for name in names]
        drafts[-1].manifest["trust"] = signing.Trust(self.trust.keys, 1, 2).to_dict()
        for draft in drafts:
            data = draft.sealed(*self.signers, leads=False)
            yield Case(data, frozenset([payload_of(data)]))

    def run(self, count: int, save: Path | None = None) -> None:
        """Raises AssertionError for the first packet that ends in another way than it may."""
        for case in self.corpus:
            self._one(case)
        for index in range(count):
            parent = self.chance.choice(
                self.corpus[-200:] if self.chance.random() < 0.3 else self.corpus
            )
            others = [case.data for case in self.corpus[: self.seeds]]
            data, payload = mutate(self.chance, parent.data, others, self.signers)
            signed = parent.signed.union(
                *(case.signed for case in self.corpus[: self.seeds]), [payload] if payload else []
            )
            case = Case(data, signed)
            try:
                if self._one(case, measured=index % TRACED_EVERY == 0) and len(data) < 2**17:
                    self.corpus.append(case)
            except BaseException:
                if save is not None:
                    save.write_bytes(data)
                raise

    def _one(self, case: Case, measured: bool = False) -> bool:
        """Whether the packet has run a line that none has run before."""
        known, begin = len(self.lines), time.process_time()
        if measured:
            tracemalloc.start()
            self._outcome(case)
            self.largest = max(self.largest, peak := tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert peak <= memory_bound(len(case.data)), (
                f"{peak} bytes for a packet of {len(case.data)}"
            )
        else:
            with covered(self.lines):
                self.outcomes[self._outcome(case)] += 1
        self.slowest = max(self.slowest, spent := time.process_time() - begin)
        assert spent <= SECONDS, f"{spent:.1f} s for a packet of {len(case.data)} bytes"
        return len(self.lines) > known

    def _outcome(self, case: Case) -> str:
        """The kind of its end."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with suppress(InputError):
                json.dumps(packet.unverified_manifest(case.data))
            try:
                opened = control.read_any(case.data, self.trust)
            except SdloraError as error:
                return type(error).__name__
            assert payload_of(case.data) in case.signed, "verified, but never signed"
            if not isinstance(opened, Packet):
                return f"verified {type(opened).__name__}"
            self._as_signed(case.data, opened)
            try:
                state = self._checked(opened, self.states[0 if opened.first == 1 else 1])
            except SdloraError as error:
                return f"verified, then {type(error).__name__}"
            self._sound(opened, state)
            return "applicable"

    def _checked(self, opened: Packet, state: TaskState) -> TaskState:
        # packets of every encoding are tried, each as one of its own lineage would be
        standing = Standing(opened.lineage, self.bundle.manifest.projections, state)
        return accept_update(opened, standing)

    def _as_signed(self, data: bytes, opened: Packet) -> None:
        """Every tensor is what safetensors reads, and every name is the signed one."""
        found = safetensors.numpy.load(data)
        manifest = json.loads(payload_of(data))
        for update, task in zip(opened.updates, manifest["tasks"], strict=True):
            assert (update.name, list(update.classes)) == (task["name"], task["classes"])
            assert to_units(update.deltas) == task["deltas"]
            assert list(update.retired) == task["retired"]
            assert [list(pair) for pair in update.renamed] == task["renamed"]
            for name, array in update.tensors().items():
                other = found.pop(f"{update.task}.{name}")
                assert (array.dtype, array.shape, array.tobytes()) == (
                    other.dtype,
                    other.shape,
                    other.tobytes(),
                )
        assert found.pop("canary.logits").tobytes() == opened.canary_logits.tobytes()
        assert not found

    def _sound(self, opened: Packet, state: TaskState) -> None:
        """What a device would compute from it is finite, and its classes are distinct."""
        factors = [dict(update.factors) for update in opened.updates]
        coefficients = (state.magnitudes - extended(self.states[0].magnitudes, state.magnitudes))[
            -len(factors) :
        ]
        merged = merge(self.bundle.weights, self.bundle.manifest.projections, factors, coefficients)
        assert all(
            np.isfinite(array).all()
            for array in (*merged.values(), state.head_weight, state.head_bias)
        )
        assert len(state.classes) == len(state.head_weight) == len(state.head_bias)
        assert len(set(state.names)) == len(state.live) > 0
        retired = [row for row, name in enumerate(state.classes) if name is None]
        assert (state.head_bias[retired] == np.float32(UNUSED)).all()
        assert not state.head_weight[retired].any()


def payload_of(data: bytes) -> bytes:
    """What is signed in a packet, taken out by nothing of ours."""
    length = int.from_bytes(data[:8], "little")
    header: Any = json.loads(data[8 : 8 + length])
    payload = base64.b64decode(json.loads(header.pop("__metadata__")["envelope"])["payload"])
    table = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    assert json.loads(payload)["content"] == hashlib.sha256(table + data[8 + length :]).hexdigest()
    return payload


@contextmanager
def covered(lines: set[tuple[str, int]]) -> Iterator[None]:
    """Add the lines of the reader that are run."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        path = frame.f_code.co_filename
        return line if "sdlora_edge" in path and path.rpartition("/")[2] in READER else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path("fuzz-failure.sdlora"))
    arguments = parser.parse_args()
    fuzzer = Fuzzer(arguments.seed)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    fuzzer.run(arguments.count, arguments.save)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{arguments.count} packets in {time.perf_counter() - begin:.0f} s, seed {arguments.seed}"
    )
    for outcome, number in fuzzer.outcomes.most_common():
        print(f"{number:9}  {outcome}")
    print(f"{len(fuzzer.corpus)} packets kept, {len(fuzzer.lines)} lines of the reader run")
    print(
        f"slowest {1000 * fuzzer.slowest:.0f} ms, most memory {fuzzer.largest} bytes, "
        f"process grew by {grown} bytes"
    )
    assert grown < container.LIMITS.packet, grown


if __name__ == "__main__":
    main()

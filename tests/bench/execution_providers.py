"""What an execution provider gives: latency, the cost of an update, and equality, beside ONNX Runtime's own CPU kernels.

ViT-Tiny with random weights, 224 px, one image, in each precision. Weights are constants, as OpenVINO wants them; the CPU runs
the bundle with weights as inputs too. Each contestant has a process of its own and a turn in each round; a ratio is the median
over rounds of the ratio within a round. An update is `Device.apply` of a packet of one task.

    make bench-providers        writes docs/figures/providers.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import figures
import numpy as np
import random_runs
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import host_logits
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.device.engines.providers import CPU
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.bundle import CONSTANTS, INPUTS
from sdlora_edge.inputs import canary
from sdlora_edge.inputs.image import PICTURES
from sdlora_edge.train.run import Run

MODEL, SIZE, TASKS, CLASSES = "vit_tiny_patch16_224", 224, 5, 100
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic")
TURN = 0.5
"""seconds of a turn"""


def images(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {PICTURES: random.standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)}


def serve(store: Path, provider: str, packets: list[Path]) -> None:
    """A contestant's own process: it applies the packets, then answers each line with the milliseconds of one image."""
    begin = time.perf_counter()
    device = Device.open(store, provider=provider)
    opened = 1e3 * (time.perf_counter() - begin)
    updates = []
    for file in packets:
        begin = time.perf_counter()
        device.apply(file)
        updates.append(1e3 * (time.perf_counter() - begin))
    np.save(store.parent / f"{store.name}.npy", device.logits(images(8)))
    one = images(1)
    print(opened, median(updates), flush=True)
    for _ in sys.stdin:
        device.logits(one)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < TURN:
            device.logits(one)
            count += 1
        print(1e3 * (time.perf_counter() - begin) / count, flush=True)


class Contestant:
    def __init__(self, store: Path, provider: str, packets: list[Path]) -> None:
        self.answers = store.parent / f"{store.name}.npy"
        command = [sys.executable, __file__, "--serve", str(store), provider, *map(str, packets)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.opened_ms, self.update_ms = self._read()

    def milliseconds(self) -> float:
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._read()[0]

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> list[float]:
        assert self._process.stdout is not None
        return list(map(float, self._process.stdout.readline().split()))


def make_packets(folder: Path, run: Run, key: Path) -> list[Path]:
    """A packet for each task; the run's tasks are in memory only."""
    signer, files = signing.load_signer(key), []
    for update, before in zip(run.updates, run.states, strict=False):
        seen = canary.inputs(update.task, run.preprocessing, 1)
        contents = packet.Contents(
            lineage=run.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=update.task,
            canary_logits=host_logits(run, update.task, seen),
        )
        files.append(folder / f"{update.task}.sdlora")
        data = packet.build(contents, lambda payload: signing.sign(payload, [signer]))
        files[-1].write_bytes(data)
    return files


def cell(
    folder: Path, run: Run, packets: list[Path], precision: str, asked: argparse.Namespace
) -> dict[str, object]:
    """One precision."""
    provider, rounds = asked.provider, asked.rounds
    stores: dict[str, tuple[str, str]] = {
        "cpu, inputs": (INPUTS, CPU),
        "cpu, constants": (CONSTANTS, CPU),
        f"{provider}, constants": (CONSTANTS, provider),
    }
    contestants = {}
    for name, (weights_as, chosen) in stores.items():
        place = folder / f"{precision}-{weights_as}-{chosen}"
        options = ExportOptions(precision=precision, weights_as=weights_as, max_classes=CLASSES)
        export_bundle(run, place / "bundle", 0, [str(folder / "keys" / "bench.pub")], options)
        Device.init(place / "bundle", place / "store", provider=chosen)
        contestants[name] = Contestant(place / "store", chosen, packets)
    times = [{name: one.milliseconds() for name, one in contestants.items()} for _ in range(rounds)]
    answers = {name: np.load(one.answers) for name, one in contestants.items()}
    reference = answers["cpu, constants"]
    found = {}
    for name, one in contestants.items():
        one.close()
        found[name] = {
            "ms": round(median(t[name] for t in times), 2),
            "ratio": round(median(t[name] / t["cpu, constants"] for t in times), 3),
            "open_ms": round(one.opened_ms),
            "update_ms": round(one.update_ms),
            "difference": float(np.abs(answers[name] - reference).max()),
        }
    return {"precision": precision, "contestants": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", default="openvino")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="providers-") as name:
        folder = Path(name)
        run = random_runs.make_run(MODEL, folder / "run", TASKS, CLASSES - TASKS, 1)
        key, _ = signing.new_key("bench", folder / "keys")
        packets = make_packets(folder, run, key)
        cells = [cell(folder, run, packets, precision, asked) for precision in asked.precision]
    values = {"model": MODEL, "provider": asked.provider, "rounds": asked.rounds, "cells": cells}
    packages = ("onnxruntime", "onnxruntime-ep-openvino", "numpy", "torch", "timm")
    path = figures.write("providers", "make bench-providers", values, packages=packages)
    print(path.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3], [Path(p) for p in sys.argv[4:]])
    else:
        main()

"""What a lower precision saves and what it costs: bytes, latency, and how often the class is still that of fp32.

Trains SD-LoRA (aligned head) on Omniglot and Caltech-101 as `make bench-method` does (about eight minutes, kept in
build/precision), exports the last state in every precision for every target, and asks each about all test images. Bytes and
latencies are those of random weights, on which they do not depend. Latencies are paired: within a round every precision has its turn, in an
order that rotates; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import figures
import method
import numpy as np
import random_runs
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import BATCH, compare, host_logits
from sdlora_edge.export.precision import PRECISIONS
from sdlora_edge.export.requests import TARGETS, ExportOptions

from sdlora_edge.device.engines import Engine, open_engine
from sdlora_edge.errors import UsageError
from sdlora_edge.formats.bundle import HEAD_BIAS, HEAD_WEIGHT, open_bundle
from sdlora_edge.inputs.image import PICTURES
from sdlora_edge.inputs.modality import parts
from sdlora_edge.train import splits
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run
from sdlora_edge.train.score import test_images_by_class

BUILD = figures.ROOT / "build" / "precision"
SETS = ("omniglot", "caltech101")
SECONDS = 20


def trained(name: str) -> Run:
    """SD-LoRA on one of the streams of `make bench-method`, seed 1993; trained once."""
    path = BUILD / name
    if not (path / "done").exists():
        shutil.rmtree(path, ignore_errors=True)
        train(resolve(None, method.settings(name, "sdlora", 1993)), path)
        (path / "done").touch()
    return Run.open(path)


def opened(run: Run, folder: Path, target: str) -> dict[str, tuple[Engine, Any, int]]:
    """{precision: (engine with one thread, what it has loaded, bytes of the model)}, of those the target has."""
    found = {}
    for precision in PRECISIONS:
        out = folder / f"{target}-{precision}"
        try:
            export_bundle(
                run,
                out,
                None,
                [],
                ExportOptions(target=target, precision=precision, min_agreement=0, tolerance=0.99),
            )
        except UsageError as error:
            print(f"{target} {precision}: {error}", file=sys.stderr)
            continue
        bundle = open_bundle(out)
        engine = open_engine(bundle, 1, out / "engine")
        head = {HEAD_WEIGHT: bundle.state.head_weight, HEAD_BIAS: bundle.state.head_bias}
        found[precision] = engine, engine.load({**bundle.weights, **head}), bundle.model_bytes
    return found


def latencies(models: dict[str, tuple[Engine, Any, int]], size: int) -> dict[str, dict[str, float]]:
    """Of one image, one thread: milliseconds, and over fp32; and the model's bytes."""
    numbers = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    image = {PICTURES: numbers}
    names, rows, end = list(models), [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(rows) < 5:
        row, turn = {}, len(rows) % len(names)
        for name in names[turn:] + names[:turn]:
            engine, loaded, _ = models[name]
            engine.run(loaded, image)
            begin = time.perf_counter()
            for _ in range(3):
                engine.run(loaded, image)
            row[name] = (time.perf_counter() - begin) / 3e-3
        rows.append(row)
    ratios = {n: median(r[n] / r["fp32"] for r in rows) for n in names}
    return {
        n: {"bytes": models[n][2], "ms": median(r[n] for r in rows), "over_fp32": ratios[n]}
        for n in names
    }


def agreement(run: Run, models: dict[str, tuple[Engine, Any, int]]) -> dict[str, dict[str, float]]:
    """With torch, on all test images: {precision: {"agreement", "images", "difference", "accuracy"}}."""
    by_class = test_images_by_class(run, len(run.updates))
    classes = list(run.states[-1].classes)
    decoded = splits.decode(by_class, classes, run.preprocessing, need=False)
    inputs = run.preprocessing.arrays(decoded.pixels)
    reference = host_logits(run, len(run.updates), inputs)
    found = {}
    for precision, (engine, loaded, _) in models.items():
        logits = np.concatenate([engine.run(loaded, part) for part in parts(inputs, BATCH)])
        parity = compare(logits, reference)
        accuracy = float((logits.argmax(axis=1) == decoded.targets).mean())
        found[precision] = {**parity.to_dict(), "accuracy": accuracy}
    return found


def kept(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, kept in build/precision, so that a run that was stopped goes on."""
    path = BUILD / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(measure()))
    print(name, path.read_text(), flush=True)
    return dict(json.loads(path.read_text()))


def main() -> None:
    values: dict[str, Any] = {"threads": 1, "batch": 1}
    for target in TARGETS:
        rows: dict[str, dict[str, Any]] = {}
        for name in (*SETS, "vit_tiny", "vit_base"):

            def measure(name: str = name, target: str = target) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as folder:
                    if name in SETS:
                        run = trained(name)
                    else:
                        size = 96 if name == "vit_tiny" else 224
                        run = random_runs.make_run(
                            f"{name}_patch16_224", Path(folder) / "run", 1, 136, size=size
                        )
                    models = opened(run, Path(folder), target)
                    return (
                        agreement(run, models)
                        if name in SETS
                        else latencies(models, run.preprocessing.size)
                    )

            for precision, found in kept(f"{target}-{name}", measure).items():
                rows.setdefault(precision, {})[name] = found
        values[target] = rows
    packages = ("torch", "timm", "onnx", "onnxruntime", "executorch", "numpy")
    print(figures.write("precision", "make bench-precision", values, packages=packages))


if __name__ == "__main__":
    main()

"""What a prediction costs with the unknown score, over the same prediction without it.

Contestants, all with random weights (time does not depend on them), 100 classes, ONNX Runtime, one thread, asked for one
decoded image at a time through `Device.predict`:

* `last`: the head sees the backbone's own features, and every image counts as known;
* `without`: the head sees class tokens of the last four blocks, and every image counts as known;
* `with`: the same, with the unknown score, which reads the features as well.

Within a round every contestant has its turn, in an order that rotates. A ratio is the median over rounds of the ratio within
a round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import figures
import numpy as np
import random_runs
from sdlora_edge.export.bundles import export_bundle

from sdlora_edge.device import Device
from sdlora_edge.formats import signing

MODELS = {"vit_tiny": ("vit_tiny_patch16_224", 96), "vit_base": ("vit_base_patch16_224", 224)}
CONTESTANTS = {"last": ("last", False), "without": ("cls:4", False), "with": ("cls:4", True)}
CLASSES = 100
LEAST_ROUNDS = 11


def opened(model: str, features: str, confident: bool, folder: Path) -> Device:
    """A device of a run that nobody trained."""
    name, size = MODELS[model]
    run = random_runs.make_run(
        name, folder / "run", 0, CLASSES, size=size, features=features, confident=confident
    )
    _, public = signing.new_key("bench", folder / "keys")
    export_bundle(run, folder / "bundle", 0, [str(public)])
    Device.init(folder / "bundle", folder / "store")
    return Device.open(folder / "store", threads=1)


def measured(model: str, seconds: float) -> dict[str, float]:
    """{contestant: milliseconds of a prediction, and its ratio to `without`}."""
    image = np.random.default_rng(1).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        devices = {
            name: opened(model, *arguments, Path(folder) / name)
            for name, arguments in CONTESTANTS.items()
        }
        if devices["with"].predict(image).threshold is None:
            raise SystemExit("the contestant with the unknown score has no threshold")
        names, rows, end = list(devices), [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(rows) < LEAST_ROUNDS:
            row, turn = {}, len(rows) % len(names)
            for name in names[turn:] + names[:turn]:
                devices[name].predict(image)
                begin = time.perf_counter()
                for _ in range(3):
                    devices[name].predict(image)
                row[name] = (time.perf_counter() - begin) / 3e-3
            rows.append(row)
    found = {f"{n}_ms": round(median(r[n] for r in rows), 3) for n in names}
    for name in ("last", "with"):
        found[f"{name}_over_without"] = round(median(r[name] / r["without"] for r in rows), 4)
    return found | {"rounds": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="of measuring, for each model")
    seconds = parser.parse_args().seconds
    values = {model: measured(model, seconds) for model in MODELS}
    command = "make bench-unknown-cost"
    print(figures.write("unknown_cost", command, {"classes": CLASSES, "threads": 1, **values}))


if __name__ == "__main__":
    main()

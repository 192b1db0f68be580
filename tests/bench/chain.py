"""Twenty packets on real images, every target: after each packet the device computes what torch computes.

`make bench-chain` writes docs/figures/chain.json; tests/export/test_chain.py runs the smaller models. Directions are random: what
has to agree does not depend on training. A run that was stopped goes on: what is done lies in build/chain.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import figures
import numpy as np
import random_runs
from PIL import Image
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import compare, host_logits
from sdlora_edge.export.requests import TARGETS, ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.formats import packet, signing
from sdlora_edge.inputs import canary
from sdlora_edge.train.run import Run

SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
BUILD = figures.ROOT / "build" / "chain"
PACKETS, BASE, NEW = 20, 10, 4
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"size": 96, "weights": "vit_tiny_patch16_224.fp16.safetensors"},
    "vit_base_patch16_224": {"size": 96},
    "efficientnet_lite0": {"size": 96},
}


def images(run: Run, count: int) -> np.ndarray:
    """Omniglot, as the device prepares it: float32 (count, 3, size, size)."""
    with zipfile.ZipFile(SHARED / "omniglot_small1.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        chosen = names[:: len(names) // count][:count]
        pixels = [
            run.preprocessing.pixels(Image.open(BytesIO(archive.read(name)))) for name in chosen
        ]
    return run.preprocessing.arrays(np.stack(pixels))


def follow(run: Run, folder: Path, inputs: np.ndarray, **options: Any) -> list[float]:
    """Export a run before its first task, apply all its tasks, and compare logits after each: the largest differences.

    Raises HealthError where one is beyond 1e-4, or an argmax differs.
    """
    key, public = signing.new_key("chain", folder / "keys")
    signer = signing.load_signer(key)
    bundle = export_bundle(
        run, folder / "bundle", 0, [str(public)], ExportOptions(**options)
    ).bundle
    device = Device.init(bundle, folder / "store")
    found = []
    for update, before in zip(run.updates, run.states, strict=False):
        logits = host_logits(run, update.task, canary.inputs(update.task, run.preprocessing))
        contents = packet.Contents(
            lineage=run.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=update.task,
            canary_logits=logits,
        )
        data = packet.build(contents, lambda payload: signing.sign(payload, [signer]))
        (folder / "next").write_bytes(data)
        device.apply(folder / "next")
        same = compare(device.logits(inputs), host_logits(run, update.task, inputs))
        found.append(
            same.require(1e-4, 1.0, 50.0, f"the device after packet {update.task}").difference
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"packets": PACKETS, "images": 16}
    for model in options.models.split(","):
        how = dict(MODELS[model])
        if "weights" in how:
            how["weights"] = SHARED / how["weights"]
        for target in options.targets.split(","):
            kept = BUILD / f"{model}-{target}.json"
            if not kept.exists():
                with tempfile.TemporaryDirectory() as folder:
                    run = random_runs.make_run(
                        model, Path(folder) / "run", PACKETS, BASE, NEW, **how
                    )
                    differences = follow(
                        run, Path(folder), images(run, values["images"]), target=target
                    )
                kept.write_text(
                    json.dumps(
                        {"packets": len(differences), "largest_difference": max(differences)}
                    )
                )
            values.setdefault(model, {})[target] = json.loads(kept.read_text())
            print(model, target, values[model][target], flush=True)
    packages = ("torch", "timm", "onnx", "onnxruntime", "executorch", "numpy")
    print(figures.write("chain", "make bench-chain", values, packages=packages))


if __name__ == "__main__":
    main()

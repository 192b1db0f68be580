"""What the matrix tests: a run of a small random ViT, its packets, and a bundle for each precision and each kind of weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.expected import record
from sdlora_edge.export.packets import build_packets
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.formats import signing
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run

BACKBONE, SIZE, CLASSES, IMAGES = "test_vit", 32, 6, 8
PRECISIONS, WEIGHTS_AS = ("fp32", "fp16", "int8", "int8-dynamic"), ("inputs", "constants")
BUNDLES = [f"{precision} {weights_as}" for precision in PRECISIONS for weights_as in WEIGHTS_AS]


def make(folder: Path) -> None:
    """Write the folders `bundles`, `packets` and `expected` into `folder`."""
    torch.manual_seed(0)
    weights = {
        name: value.clone() for name, value in timm.create_model(BACKBONE).state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    random = np.random.default_rng(0)
    for colour in random.integers(0, 256, (CLASSES, 3)):
        made = folder / "images" / "-".join(map(str, colour))
        made.mkdir(parents=True)
        for i in range(IMAGES):
            noise = random.integers(-25, 25, (SIZE, SIZE, 3))
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(made / f"{i}.png")
    settings = {
        "data": str(folder / "images"),
        "backbone": BACKBONE,
        "weights": str(folder / "weights.safetensors"),
        "image_size": SIZE,
        "tasks": 3,
        "epochs": 3,
        "lr": 0.05,
    }
    run = train(resolve(None, settings), folder / "run")
    key, public = signing.new_key("matrix", folder / "keys")
    for name in BUNDLES:
        precision, weights_as = name.split()
        bundle = folder / "bundles" / name.replace(" ", "-")
        export_bundle(
            Run.open(run.path),
            bundle,
            1,
            [str(public)],
            ExportOptions(precision=precision, weights_as=weights_as),
        )
    build_packets(run.path, folder / "bundles" / "fp32-inputs", key, out=folder / "packets")
    record(Run.open(run.path), made, folder / "expected")


if __name__ == "__main__":
    make(Path(sys.argv[1]))

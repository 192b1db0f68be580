"""The whole loop on real images: Omniglot's small background set 1, 136 characters in 8 tasks, ViT-Tiny at 96 px.

Exports after task 1, ships tasks 2 to 8 as packets, compares host and device over all test images after each, and writes
docs/figures/loop.json. Takes about ten minutes on two cores; SDLORA_EDGE_DATA says where images and weights lie.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import figures

from sdlora_edge.cli.train import accuracy_row
from sdlora_edge.demo import ship
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train


def main() -> None:
    shared = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
    settings = resolve(
        None,
        {
            "data": str(shared / "omniglot_small1.zip"),
            "weights": str(shared / "vit_tiny_patch16_224.fp16.safetensors"),
            "backbone": "vit_tiny_patch16_224",
            "image_size": 96,
            "tasks": 8,
            "head": "paper",
            "test_fraction": 0.3,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            settings,
            Path(folder) / "runs" / "omniglot",
            lambda run: print(accuracy_row(run), flush=True),
        )
        shipped = ship(run, Path(folder), 1)
    for row in shipped.tasks:
        if row.same_top != row.images or row.max_logit_difference > 1e-4:
            raise SystemExit(f"host and device differ: {row}")
    print(figures.write("loop", "make bench-loop", shipped.to_dict()))


if __name__ == "__main__":
    main()

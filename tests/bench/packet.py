"""What a packet weighs, and what its encoding costs: ViT-Tiny on Omniglot (one trained run, encoded anew), ViT-B/16 in bytes.

Beside each: the whole model, and what general tools make of the two exported models (zstd --patch-from, bsdiff). Writes
docs/figures/packet.json. `--run RUN` takes a trained run instead of training one; SDLORA_EDGE_DATA says where images and
weights lie.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import numpy as np
import timm
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.packets import accuracies
from sdlora_edge.export.requests import PacketOptions

from sdlora_edge.cli.train import accuracy_row
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.bundle import FACTORS, MANIFEST, TRUST
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.encoding import ENCODINGS, Factors, encode
from sdlora_edge.formats.head_update import RANK as RANK_OF_STEP
from sdlora_edge.formats.head_update import Step
from sdlora_edge.formats.limits import LIMITS
from sdlora_edge.method import backbones
from sdlora_edge.state import TaskState, TaskUpdate, changed_rows, merge
from sdlora_edge.train.config import resolve
from sdlora_edge.train.loop import train
from sdlora_edge.train.run import Run

RANK, CLASSES = 10, 10
TARGET_BYTES = {"fp16": 900_000, "int8": 480_000, "int4": 300_000}
"""of the whole packet, ViT-B/16 with 100 known classes"""
WIDTHS = {"cls:4": 4 * 768, "last": 768}
"""features that the head sees"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--train-only", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = (
            Run.open(given.run)
            if given.run and given.run.exists()
            else trained(given.run or Path(folder) / "run")
        )
        if given.train_only:
            return
        values = {"vit_tiny": tiny(run, Path(folder)), "vit_base": base(Path(folder))}
    print(figures.write("packet", "make bench-packet", values))
    sizes = {name: values["vit_base"]["encodings"][name]["bytes"] for name in TARGET_BYTES}
    if large := [name for name, limit in TARGET_BYTES.items() if sizes[name] > limit]:
        raise SystemExit(
            "; ".join(f"{n}: {sizes[n]} bytes are more than {TARGET_BYTES[n]}" for n in large)
        )


def trained(path: Path) -> Run:
    """The stream of loop.py, with the default, aligned head."""
    shared = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
    settings = {
        "data": str(shared / "omniglot_small1.zip"),
        "weights": str(shared / "vit_tiny_patch16_224.fp16.safetensors"),
        "backbone": "vit_tiny_patch16_224",
        "image_size": 96,
        "tasks": 8,
        "test_fraction": 0.3,
    }
    return train(resolve(None, settings), path, lambda run: print(accuracy_row(run), flush=True))


def tiny(run: Run, folder: Path) -> dict[str, Any]:
    """Bytes of the last packet, the largest error of a weight and accuracy after the last task, by encoding."""
    last, found = len(run.updates), {}
    for encoding in ENCODINGS:
        view = run.encoded(encoding)
        scores = accuracies(view, last, PacketOptions(images=run.config.data.data))
        found[encoding] = {
            "bytes": view.packet_bytes(view.updates[last - 1]),
            "weight_error": view.weight_error(last),
            **scores.to_dict(),
        }
        print(encoding, found[encoding], flush=True)
    update = run.updates[-1]
    models = []
    _, public = signing.new_key("bench", folder / "keys")
    for task in (last - 1, last):
        export_bundle(run, folder / f"bundle{task}", task, [str(public)])
        files = sorted(
            p
            for p in (folder / f"bundle{task}").iterdir()
            if p.name not in (MANIFEST, TRUST, FACTORS)
        )
        models.append(b"".join(p.read_bytes() for p in files))
    rows = {
        "old_rows": len(update.head.index),
        "bytes_per_old_row": round(update.head.known_bytes / max(1, len(update.head.index))),
        "new_rows": len(update.classes),
    }
    return {"encodings": found, **rows, "model_bytes": len(models[1]), **patches(*models, folder)}


def base(folder: Path) -> dict[str, Any]:
    """Bytes of a packet for ViT-B/16 of rank 10, with random numbers: 10 new classes, and all known ones change."""
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    projections = backbones.projections(backbone)
    random = np.random.default_rng(0)
    exact = {}
    for p in projections:
        A = random.uniform(-1, 1, (RANK, p.columns)) / p.columns**0.5
        B = random.standard_normal((p.stop - p.start, RANK))
        exact[p.name] = Factors(
            A.astype(np.float32), (B / np.linalg.norm(B @ A)).astype(np.float32)
        )
    sizes = {
        (features, known, rank): _bytes(exact, width, known, Step(rank))
        for features, width in WIDTHS.items()
        for known in (100, 1000)
        for rank in (RANK_OF_STEP, 12)
    }
    own = sizes["cls:4", 100, RANK_OF_STEP]
    weights = {p.tensor: backbone.get_parameter(p.tensor).detach().numpy() for p in projections}
    changed = merge(weights, projections, [exact], np.array([1.0]))
    size = 4 * (sum(t.numel() for t in backbone.state_dict().values()) + 110 * (4 * 768 + 1))
    pair = (b"".join(np.asarray(w[name]).tobytes() for name in weights) for w in (weights, changed))
    return {
        "encodings": {encoding: {"bytes": count} for encoding, count in own.items()},
        "bytes": {f"{f}, {known} known, rank {r}": own for (f, known, r), own in sizes.items()},
        "model_bytes": size,
        **patches(*pair, folder),
    }


def _bytes(exact: dict[str, Factors], width: int, known: int, step: Step) -> dict[str, int]:
    """Bytes of a packet by encoding. width: features; known: classes before it."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((2, known + CLASSES, width)).astype(np.float32) / 30
    biases, confidence = np.zeros(known + CLASSES, np.float32), Confidence.none(known + CLASSES)
    components = LIMITS.components
    confidence = replace(
        confidence,
        weight=np.ones((components, known + CLASSES), np.int8),
        scale=np.ones(components, np.float32),
        bias=np.ones(components, np.float32),
        mean=np.ones(width, np.float16),
        precision=np.ones(width, np.float16),
        threshold=np.ones(1, np.float32),
    )
    names = tuple(f"class {i}" for i in range(known + CLASSES))
    before = TaskState(
        0, "base", "00" * 32, names[:known], np.zeros(0), rows[0, :known], biases[:known], {}, confidence
    )  # fmt: skip
    head = changed_rows(before, rows[1], biases, step=step, confidence=confidence)
    found = {}
    for encoding in ENCODINGS:
        factors = {name: encode(f, encoding) for name, f in exact.items()}
        update = TaskUpdate(1, "task", names[known:], np.array([1.0]), head, factors)
        contents = packet.Contents(
            lineage="00" * 32,
            begin=before.digest,
            updates=(update,),
            canary_seed=1,
            canary_logits=np.zeros((2, known + CLASSES), np.float32),
            encoding=encoding,
        )
        found[encoding] = len(packet.build(contents, signing.unsigned))
    return found


def patches(old: bytes, new: bytes, folder: Path) -> dict[str, int]:
    """Bytes of a patch from one model to the next, by the tools that are here."""
    found = {}
    for name, data in {"old": old, "new": new}.items():
        (folder / name).write_bytes(data)
    if zstd := shutil.which("zstd"):
        options = [
            "-q",
            "-f",
            "-19",
            "--long=31",
            f"--patch-from={folder / 'old'}",
            str(folder / "new"),
            "-o",
            str(folder / "zst"),
        ]
        subprocess.run([zstd, *options], check=True)
        found["zstd_patch_bytes"] = (folder / "zst").stat().st_size
    try:
        import bsdiff4
    except ImportError:
        print("bsdiff4 is not installed: that column stays empty")
    else:
        found["bsdiff_bytes"] = len(bsdiff4.diff(old, new))
    return found


if __name__ == "__main__":
    main()

"""Every variant of the method on three real streams: rows trained alike, three seeds, scored on test images.

Writes docs/figures/method.json. Each training leaves one JSON file in build/method/, so a run that was stopped goes on; two
trainings run at once, one core each. Settings were chosen on a validation part of the training images (--validate).
SDLORA_EDGE_DATA says where images and weights lie.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sdlora_edge.train.config import to_toml
from sdlora_edge.train.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
RESULTS = ROOT / "build" / "method"
SEEDS = (1993, 1994, 1995)
COMMON: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 96,
    "test_fraction": 0.3,
    "head": "aligned",
    "precision": "bf16",
}
SETS: dict[str, dict[str, Any]] = {
    "omniglot": {"data": "omniglot_small1.zip", "tasks": 8, "epochs": 10},
    "caltech101": {
        "data": "caltech101_128px_max50.zip",
        "tasks": 10,
        "epochs": 5,
        "train_limit": 24,
    },
    "pacs": {
        "data": "pacs_128px.zip",
        "protocol": "domain",
        "tasks": 4,
        "epochs": 5,
        "train_limit": 100,
    },
}
HEADS = {"": "plain_correct", " aligned": "correct"}
"""what a row's name ends with, and the matrix in metrics.json: one training is scored with both heads"""
ROW_BYTES = 192 * 2 + 8
"""of a head row in a packet: float16 weights, bias, index"""
ROWS: dict[str, dict[str, Any]] = {
    "frozen": {"method": "frozen"},
    "lora": {"method": "lora"},
    "sdlora": {},
    "authors": {"magnitudes": "reset", "magnitude_init": 0.8, "magnitude_norm": "factors", "lr": 0.01, "head_lr_factor": 1.0,
                "magnitude_lr_factor": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1]},
    "fixed": {"magnitudes": "fixed"},
    "rr": {"rank": "10,8@4,6@8"},
    "kd": {"directions": "shared", "absorb": 0.95},
    "joint": {"tasks": 1},
}  # fmt: skip


def settings(name: str, row: str, seed: int) -> dict[str, Any]:
    chosen = (
        COMMON
        | SETS[name]
        | ROWS[row]
        | {"seed": seed, "weights": str(SHARED / "vit_tiny_patch16_224.fp16.safetensors")}
    )
    if row == "joint":  # the same low-rank budget as all tasks together
        chosen["rank"] = str(10 * SETS[name]["tasks"])
    return chosen | {"data": str(SHARED / chosen["data"])}


def train(name: str, row: str, seed: int) -> None:
    """One training, in a process of its own with one thread; its metrics go to build/method/."""
    target = RESULTS / f"{name}-{row}-{seed}.json"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.toml").write_text(to_toml(Settings.of(**settings(name, row, seed))))
        command = [
            sys.executable,
            "-m",
            "sdlora_edge",
            "train",
            "--config",
            f"{folder}/config.toml",
            "--out",
            f"{folder}/run",
            "--json",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} {row} {seed}: {done.stderr.strip().splitlines()[-1]}")
        tasks = sorted((Path(folder) / "run" / "tasks").glob("*/metrics.json"))
        entries = [json.loads(path.read_text()) for path in tasks]
    keep = (
        "correct",
        "plain_correct",
        "frozen_correct",
        "totals",
        "seconds",
        "packet_bytes",
        "rank",
        "absorbed",
        "residual",
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp")
    partial.write_text(
        json.dumps(
            [{k: e[k] for k in keep if k in e} | {"classes": len(e["classes"])} for e in entries]
        )
    )
    shutil.move(partial, target)
    print(
        name,
        row,
        seed,
        *(
            round(100 * sum(entries[-1][m][-1]) / sum(entries[-1]["totals"]), 1)
            for m in HEADS.values()
        ),
        flush=True,
    )


def summary(entries: list[dict[str, Any]], matrix: str, domains: bool) -> dict[str, float]:
    """The columns of one training, accuracies in percent. A plain head's packets lack the old classes' rows (but for domains)."""
    from sdlora_edge.train.metrics import summary as metrics

    old = np.cumsum([0] + [e["classes"] for e in entries[:-1]]) * (
        matrix == "plain_correct" and not domains
    )
    totals = entries[-1]["totals"]
    found = metrics(entries[-1][matrix], [totals[: i + 1] for i in range(len(totals))]).to_dict()
    return {
        **{c: 100 * float(found[c]) for c in ("last", "average_anytime", "forgetting")},
        "seconds_per_task": float(np.mean([e["seconds"] for e in entries])),
        "packet_bytes": float(
            np.mean([e["packet_bytes"] - ROW_BYTES * n for e, n in zip(entries, old, strict=True)])
        ),
    }


def collect() -> dict[str, Any]:
    """{set: {row: {column: [mean, std]}}, "gap_closed": {set: share}}; a row without "aligned" in its name has the plain head."""
    table: dict[str, Any] = {}
    for name in SETS:
        rows: dict[str, Any] = {}
        for row in ROWS:
            files = [RESULTS / f"{name}-{row}-{seed}.json" for seed in SEEDS]
            if not (runs := [json.loads(path.read_text()) for path in files if path.exists()]):
                continue
            for head, matrix in HEADS.items():
                columns = [summary(entries, matrix, name == "pacs") for entries in runs]
                rows[row + head] = {"seeds": len(runs)} | {
                    c: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0]
                    for c in columns[0]
                    if (v := [x[c] for x in columns])
                }
            if row == "kd":
                facts = {
                    "absorbed": [sum(bool(e.get("absorbed")) for e in r) for r in runs],
                    "tasks": sum(len(r) for r in runs),
                }
                rows[row] |= facts
                rows[f"{row} aligned"] |= facts
        table[name] = rows
    gap = {}
    for name, rows in table.items():
        low, high = (
            rows["frozen aligned"]["last"][0],
            max(rows["joint"]["last"][0], rows["joint aligned"]["last"][0]),
        )
        gap[name] = (rows["sdlora aligned"]["last"][0] - low) / (high - low)
    return {
        "sets": {n: {**COMMON, **SETS[n]} for n in SETS},
        "seeds": SEEDS,
        "gap_closed": gap,
        **table,
    }


def main() -> None:
    chosen = [name for name in sys.argv[1:] if name in SETS] or list(SETS)
    work = (
        []
        if "--collect" in sys.argv
        else [(name, row, seed) for seed in SEEDS for row in ROWS for name in chosen]
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(*job), work))
    import figures

    print(figures.write("method", "make bench-method", collect()))


if __name__ == "__main__":
    main()

"""Every variant of the method on four real streams: rows trained alike, three seeds, scored on test images.

Writes docs/figures/method.json. Each training leaves one JSON file in build/method/, so a run that was stopped goes on; two
trainings run at once, one core each. Settings were chosen on a validation part of the training images (--validate).
Arguments: names of sets and rows to train (default: all), --collect (train nothing). SDLORA_EDGE_DATA says where images and
weights lie. `method_heads` scores a training with other heads than those that it has itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
    "cifar100": {"data": "cifar100_sub.zip", "tasks": 10, "epochs": 5},
}
OTHERS = {
    "omniglot": "caltech101",
    "caltech101": "omniglot",
    "pacs": "omniglot",
    "cifar100": "omniglot",
}
"""the dataset whose images nothing in a set is like"""
MATRICES = {"": "plain_correct", " aligned": "correct"}
"""what a row's name ends with, and the matrix in metrics.json: one training is scored with both heads"""
ROW_BYTES = 192 + 8
"""of a head row in a packet: int8 weights, scale, bias"""
PAPER: dict[str, Any] = {"turned": 0.0, "held_out": 0.0, "first_task": 1.0}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "joint": {"tasks": 1, **PAPER},
    "joint turned": {"tasks": 1, "held_out": 0.0},
    "sdlora": PAPER,
    "frozen": {"method": "frozen", **PAPER},
    "lora": {"method": "lora", **PAPER},
    "ewc": {"method": "lora", **PAPER},
    "authors": {"magnitudes": "reset", "magnitude_init": 0.8, "magnitude_norm": "factors", "lr": 0.01, "head_lr_factor": 1.0,
                "magnitude_lr_factor": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1], **PAPER},
    "fixed": {"magnitudes": "fixed", **PAPER},
    "rr": {"rank": "10,8@4,6@8", **PAPER},
    "kd": {"directions": "shared", "absorb": 0.005, **PAPER},
}  # fmt: skip


EWC = Path(__file__).with_name("ewc.py")


def settings(name: str, row: str, seed: int) -> dict[str, Any]:
    chosen = (
        COMMON
        | SETS[name]
        | ROWS[row]
        | {"seed": seed, "weights": str(SHARED / "vit_tiny_patch16_224.fp16.safetensors")}
    )
    if row.startswith("joint"):  # the same low-rank budget as all tasks together
        chosen["rank"] = str(10 * SETS[name]["tasks"])
    return chosen | {"data": str(SHARED / chosen["data"])}


def train(name: str, row: str, seed: int) -> None:
    """One training, in a process of its own with one thread; its metrics go to build/method/."""
    target = RESULTS / f"{name}-{row}-{seed}.json"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.toml").write_text(to_toml(Settings.of(**settings(name, row, seed))))
        program = [str(EWC)] if row == "ewc" else ["-m", "sdlora_edge"]
        command = [sys.executable, *program, "train", "--json"]
        command += ["--config", f"{folder}/config.toml", "--out", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} {row} {seed}: {done.stderr.strip().splitlines()[-1]}")
        tasks = sorted((Path(folder) / "run" / "tasks").glob("*/metrics.json"))
        entries = [json.loads(path.read_text()) for path in tasks]
        heads: dict[str, Any] = {}
        if row == "default":
            others = SHARED / SETS[OTHERS[name]]["data"]
            command = [
                sys.executable,
                str(Path(__file__).with_name("method_heads.py")),
                f"{folder}/run",
                str(others),
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name} {row} {seed}: {done.stderr.strip().splitlines()[-1]}")
            heads = json.loads(done.stdout.splitlines()[-1])
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
        "calibration",
        "unknown",
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp")
    partial.write_text(
        json.dumps(
            {
                "tasks": [
                    {k: e[k] for k in keep if k in e} | {"classes": len(e["classes"])}
                    for e in entries
                ],
                "heads": heads,
            }
        )
    )
    shutil.move(partial, target)
    print(
        name,
        row,
        seed,
        *(
            round(100 * sum(entries[-1][m][-1]) / sum(entries[-1]["totals"]), 1)
            for m in MATRICES.values()
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


def spread(values: list[float]) -> list[float]:
    """[mean, standard deviation]."""
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]


def of_row(name: str, row: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """{row, with both heads: {column: [mean, std]}} of the trainings of a row."""
    rows: dict[str, Any] = {}
    # `method_heads` has the frozen backbone's aligned heads.
    for head, matrix in list(MATRICES.items())[: 1 if row == "frozen" else None]:
        columns = [summary(run["tasks"], matrix, name == "pacs") for run in runs]
        rows[row + head] = {"seeds": len(runs)} | {
            c: spread([x[c] for x in columns]) for c in columns[0]
        }
        if row == "kd":
            rows[row + head] |= {
                "absorbed": [sum(bool(e.get("absorbed")) for e in r["tasks"]) for r in runs],
                "tasks": sum(len(r["tasks"]) for r in runs),
            }
    return rows


def of_heads(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows that `method_heads` adds, and the figures of calibration and unknown images."""
    heads = [run["heads"] for run in runs]
    found = {
        key: {"seeds": len(runs)} | {c: spread([h[key][c] for h in heads]) for c in columns}
        for key, columns in heads[0].items()
        if key != "unknown"
    }
    unknown = {key: spread([h["unknown"][key] for h in heads]) for key in heads[0]["unknown"]}
    last = [run["tasks"][-1] for run in runs]
    ece = spread([100 * entry["calibration"]["ece"] for entry in last])
    accepted = spread([entry["unknown"]["accepted"] for entry in last])
    return found | {"calibration": {"ece": ece}, "unknown": unknown | {"accepted": accepted}}


def collect() -> dict[str, Any]:
    """{set: {row: {column: [mean, std]}}, "gap_closed": {set: share}}; a row without "aligned" in its name has the plain head."""
    table: dict[str, Any] = {}
    gap: dict[str, float] = {}
    turned: dict[str, float] = {}
    for name in SETS:
        rows: dict[str, Any] = {}
        for row in ROWS:
            files = [RESULTS / f"{name}-{row}-{seed}.json" for seed in SEEDS]
            if runs := [json.loads(path.read_text()) for path in files if path.exists()]:
                rows |= of_row(name, row, runs)
                rows |= of_heads(runs) if row == "default" else {}
        table[name] = rows
        if "joint" in rows and "default" in rows:
            gap[name] = closed(rows, ("joint", "joint aligned"))
        if "joint turned" in rows and "default" in rows:
            turned[name] = closed(rows, [row for row in rows if row.startswith("joint")])
    return {
        "sets": {n: {**COMMON, **SETS[n]} for n in SETS},
        "seeds": SEEDS,
        "gap_closed": gap,
        "gap_closed_turned": turned,
        **table,
    }


def closed(rows: dict[str, Any], joint: Sequence[str]) -> float:
    """The default's share of the gap from the frozen backbone to the best of these rows."""
    last = {name: rows[name]["last"][0] for name in (*joint, "frozen aligned", "default aligned")}
    low = last["frozen aligned"]
    return float((last["default aligned"] - low) / (max(last[name] for name in joint) - low))


def main() -> None:
    asked = sys.argv[1:]
    names = [name for name in asked if name in SETS] or list(SETS)
    rows = [row for row in ROWS if row.replace(" ", "-") in asked] or list(ROWS)
    work = (
        []
        if "--collect" in asked
        else [(name, row, seed) for seed in SEEDS for row in rows for name in names]
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: train(*job), work))
    import figures

    print(figures.write("method", "make bench-method", collect()))


if __name__ == "__main__":
    main()

"""Every variant of the method on four real streams: rows trained alike, three seeds, scored on test images.

Writes docs/figures/method.json. Each training leaves its figures in docs/figures/method_runs.json, which is committed: a run that
was stopped goes on, also on another machine. Two trainings run at once, one core each. Settings were chosen on a validation part of the training images (--validate).
Arguments: names of sets and rows to train (default: all), --collect (train nothing). SDLORA_EDGE_DATA says where images and
weights lie. `method_heads` scores a training with other heads than those that it has itself.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
import numpy as np
import runs

from sdlora_edge.train.config import to_toml
from sdlora_edge.train.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
FIGURES = ROOT / "docs" / "figures"
RUNS = FIGURES / "method_runs.json"
"""{"SET ROW SEED": {"heads": {row with its head: {column: figure}}, ...}}"""
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


EWC, HEADS = (Path(__file__).with_name(name) for name in ("ewc.py", "method_heads.py"))


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


def train(name: str, row: str, seed: int) -> dict[str, Any]:
    """One training, in a process of its own with one thread, and the figures of it that are kept."""
    call = partial(runs.call, f"{name} {row} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        config, run = Path(folder) / "config.toml", Path(folder) / "run"
        config.write_text(to_toml(Settings.of(**settings(name, row, seed))))
        program = [str(EWC)] if row == "ewc" else ["-m", "sdlora_edge"]
        call(*program, "train", "--json", "--config", str(config), "--out", str(run))
        entries = [json.loads(p.read_text()) for p in sorted(run.glob("tasks/*/metrics.json"))]
        # `method_heads` has the frozen backbone's aligned heads.
        matrices = list(MATRICES.items())[: 1 if row == "frozen" else None]
        found: dict[str, Any] = {
            "heads": {row + head: summary(entries, m, name == "pacs") for head, m in matrices}
        }
        if row == "default":
            other = SHARED / SETS[OTHERS[name]]["data"]
            heads = json.loads(call(str(HEADS), str(run), str(other)).splitlines()[-1])
            found["unknown"] = heads.pop("unknown")
            found["unknown"]["accepted"] = entries[-1]["unknown"]["accepted"]
            found["calibration"] = {"ece": 100 * entries[-1]["calibration"]["ece"]}
            found["heads"] |= heads
        if row == "kd":
            found["absorbed"] = sum(bool(entry.get("absorbed")) for entry in entries)
            found["tasks"] = len(entries)
        return found


def summary(entries: list[dict[str, Any]], matrix: str, domains: bool) -> dict[str, float]:
    """The columns of one training, accuracies in percent. A plain head's packets lack the old classes' rows (but for domains)."""
    from sdlora_edge.train.metrics import summary as metrics

    old = np.cumsum([0] + [len(e["classes"]) for e in entries[:-1]]) * (
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


def spread(values: list[dict[str, float]]) -> dict[str, list[float]]:
    """{column: [mean, standard deviation]}. A training that was paused has no seconds."""
    return {c: [float(np.mean(of := [v[c] for v in values if c in v])), float(np.std(of, ddof=1)) if len(of) > 1 else 0.0]
            for c in values[0]}  # fmt: skip


def of_row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """{row, with its head: {column: [mean, std]}} of the trainings of a row; of the default also calibration and unknown images."""
    rows = {
        head: {"seeds": len(found)} | spread([run["heads"][head] for run in found])
        for head in found[0]["heads"]
    }
    if "absorbed" in found[0]:
        absorbed = {"absorbed": [r["absorbed"] for r in found], "tasks": sum(r["tasks"] for r in found)}  # fmt: skip
        rows = {head: columns | absorbed for head, columns in rows.items()}
    return rows | {
        part: spread([r[part] for r in found]) for part in ("calibration", "unknown") if part in found[0]
    }  # fmt: skip


def collect(every: dict[str, Any]) -> dict[str, Any]:
    """{set: {row: {column: [mean, std]}}, "gap_closed": {set: share}}; a row without "aligned" in its name has the plain head.

    A row whose trainings are fewer than those behind the figures of before keeps these figures."""
    path = FIGURES / "method.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    table: dict[str, Any] = {}
    gap: dict[str, float] = {}
    turned: dict[str, float] = {}
    for name in SETS:
        rows: dict[str, Any] = dict(before.get(name, {}))
        for row in ROWS:
            found = [every[key] for seed in SEEDS if (key := f"{name} {row} {seed}") in every]
            if len(found) >= max(1, rows.get(row, {}).get("seeds", 0)):
                rows |= of_row(found)
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
    if "--collect" not in asked:
        keys = {f"{name} {row} {seed}": (name, row, seed) for name in names for seed in SEEDS for row in rows}  # fmt: skip
        runs.train(RUNS, keys, lambda key: train(*keys[key]))
    print(figures.write("method", "make bench-method", collect(runs.kept(RUNS))))


if __name__ == "__main__":
    main()

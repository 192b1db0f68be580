"""SD-LoRA on texts: four sets of the Standard CL Benchmark in three orders, with MiniLM as the encoder.

Writes docs/figures/text.json. Each training leaves one JSON file in build/text/, so a run that was stopped goes on; two
trainings run at once, one core each. Settings were tried roughly on a validation part of the training texts.

    rows       aligned        the shipped head, fitted again after each task
               plain          the rows as they were trained with their task (the paper's head)
               frozen         the frozen encoder with an aligned head of its own
    of         sdlora         SD-LoRA; lora: one LoRA; joint: all sets at once, rank 40
    all        accuracy over all classes and all test texts
    own        mean over the sets of the accuracy among the set's own classes, as the literature has it

SDLORA_EDGE_DATA says where text_cl.zip lies. Argument: the folder with MiniLM's config.json, model.safetensors and tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import figures
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
RESULTS = ROOT / "build" / "text"
ORDERS = {
    "1": ("agnews", "dbpedia", "amazon", "yelp"),
    "2": ("yelp", "dbpedia", "agnews", "amazon"),
    "3": ("dbpedia", "amazon", "yelp", "agnews"),
}
SEEDS = (1993, 1994, 1995)
TRAIN, TEST = 200, 500
"""training texts of a class, test texts of a set"""
COMMON: dict[str, Any] = {"tasks": 1, "max_tokens": 64, "precision": "bf16", "train_limit": TRAIN, "epochs": 3, "lr": 5e-4,
                          "optimizer": "adamw", "head_lr_factor": 1.0, "first_task": 1.0}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "sdlora": {},
    "lora": {"method": "lora"},
    "joint": {"rank": "40"},
}


def extracted(folder: Path, seed: int) -> None:
    """The sets as folders with train.jsonl and test.jsonl, and `all`, which holds all of them."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    with zipfile.ZipFile(SHARED / "text_cl.zip") as archive:
        for name in ORDERS["1"]:
            for split, all_of in lines.items():
                own = archive.read(f"{name}/{split}.jsonl").decode().splitlines()
                random = np.random.RandomState(seed if split == "train" else 0)
                chosen = [own[i] for i in random.permutation(len(own))][
                    : TEST if split == "test" else None
                ]
                (folder / name).mkdir(exist_ok=True)
                (folder / name / f"{split}.jsonl").write_text("\n".join(chosen))
                all_of += chosen
    (folder / "all").mkdir(exist_ok=True)
    for split, all_of in lines.items():
        (folder / "all" / f"{split}.jsonl").write_text("\n".join(all_of))


def one(order: str, row: str, seed: int, model: str, more: dict[str, Any]) -> dict[str, Any]:
    """Train one row, and score it on every set."""
    from sdlora_edge.train.loop import add_task, train
    from sdlora_edge.train.settings import Settings

    names = ("all",) if row == "joint" else ORDERS[order]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        extracted(folder, seed)
        values = (
            COMMON
            | ROWS[row]
            | more
            | {"backbone": model, "seed": seed, "data": str(folder / names[0])}
        )
        run = train(Settings.of(**values), folder / "run")
        for name in names[1:]:
            run = add_task(run.path, folder / name, name)
        return scored(run, folder, bool(more.get("validate"))) | {
            "packet_bytes": [entry["packet_bytes"] for entry in run.metrics],
            "seconds": [entry["seconds"] for entry in run.metrics],
        }


def scored(run: Any, folder: Path, validate: bool) -> dict[str, Any]:
    """{head: {"all", "own", "sets"}} of the newest state, in percent."""
    from sdlora_edge.train import splits
    from sdlora_edge.train.evaluator import Evaluator
    from sdlora_edge.train.score import Learned

    learned, found = Learned.of(run), dict[str, Any]()
    moved, frozen = Evaluator(run, learned.weights), Evaluator(run, {})
    seen = {}
    for name in ORDERS["1"]:
        source = splits.load_for(run.config, str(folder / name))
        part = splits.part(source, name, source.classes, (), run.config)
        texts = splits.decode(
            part.test if validate else source.test, source.classes, run.preprocessing, need=True
        )
        rows = np.array([learned.state.classes.index(c) for c in source.classes])
        seen[name] = (
            rows,
            rows[texts.targets],
            {True: moved.features(texts), False: frozen.features(texts)},
        )
    for head, (weight, bias) in learned.heads().items():
        right, own, total = [], [], 0
        for rows, truth, features in seen.values():
            logits = features[head != "frozen_correct"][:, : weight.shape[1]] @ weight.T + bias
            right.append(float((logits.argmax(axis=1) == truth).sum()))
            own.append(100 * float((rows[logits[:, rows].argmax(axis=1)] == truth).mean()))
            total += len(truth)
        label = {"correct": "aligned", "plain_correct": "plain", "frozen_correct": "frozen"}[head]
        found[label] = {"all": 100 * sum(right) / total, "own": float(np.mean(own)), "sets": own}
    return found


def train_all(model: str, orders: list[str], rows: list[str], seeds: list[int]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    jobs = [
        (o, r, s) for s in seeds for r in rows for o in orders if r != "joint" or o == orders[0]
    ]

    def job(order: str, row: str, seed: int) -> None:
        target = RESULTS / f"{'all' if row == 'joint' else order}-{row}-{seed}.json"
        if target.exists():
            return
        command = [sys.executable, __file__, model, "--one", order, row, str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{order} {row} {seed}: {done.stderr.strip().splitlines()[-1]}")
        target.write_text(done.stdout.splitlines()[-1])
        print(
            target.stem,
            {
                k: round(v["all"], 1)
                for k, v in json.loads(target.read_text()).items()
                if k in ("aligned", "plain", "frozen")
            },
            flush=True,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: job(*one), jobs))


def collect() -> dict[str, Any]:
    """Means over seeds, by order and row; the gap closed from the frozen encoder to joint training."""
    rows: dict[str, Any] = {}
    for path in sorted(RESULTS.glob("*.json")):
        order, row, _ = path.stem.split("-")
        rows.setdefault(f"order {order}" if order != "all" else "joint", {}).setdefault(
            row, []
        ).append(json.loads(path.read_text()))
    table: dict[str, Any] = {}
    for order, own in rows.items():
        for row, runs in own.items():
            for head in ("aligned", "plain", "frozen"):
                if head == "frozen" and row != "sdlora":
                    continue
                name = "frozen" if head == "frozen" else f"{row} {head}"
                table.setdefault(order, {})[name] = {
                    "seeds": len(runs),
                    **{
                        key: round(float(np.mean([r[head][key] for r in runs])), 2)
                        for key in ("all", "own")
                    },
                }
    joint = max(entry["all"] for entry in table["joint"].values())
    streams = [own for order, own in table.items() if order != "joint"]
    gaps = [
        (own["sdlora aligned"]["all"] - own["frozen"]["all"]) / (joint - own["frozen"]["all"])
        for own in streams
    ]
    packets = [
        n for own in rows.values() for r in own.get("sdlora", ()) for n in r["packet_bytes"][1:]
    ]
    return {
        "train_texts_per_class": TRAIN,
        "test_texts_per_set": TEST,
        "settings": COMMON,
        "gap_closed": round(float(np.mean(gaps)), 3),
        "aligned_minus_plain": round(
            float(
                np.mean(
                    [own["sdlora aligned"]["all"] - own["sdlora plain"]["all"] for own in streams]
                )
            ),
            2,
        ),
        "packet_bytes": round(float(np.mean(packets))),
        **table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the encoder")
    parser.add_argument("--orders", nargs="*", default=list(ORDERS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--one", nargs=3, metavar=("ORDER", "ROW", "SEED"))
    parser.add_argument(
        "--more", type=json.loads, default={}, help="other settings, as JSON; with --one"
    )
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    if given.one:
        order, row, seed = given.one
        print(json.dumps(one(order, row, int(seed), given.model, given.more)))
        return
    if not given.collect:
        train_all(given.model, given.orders, given.rows, given.seeds)
    values = collect()
    weights = Path(given.model) / "model.safetensors"
    values["packet_over_model"] = round(values["packet_bytes"] / weights.stat().st_size, 6)
    print(
        figures.write(
            "text",
            "make bench-text MODEL=FOLDER",
            values,
            packages=("torch", "transformers", "numpy"),
        )
    )


if __name__ == "__main__":
    main()

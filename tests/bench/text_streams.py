"""SD-LoRA on texts: four sets of the Standard CL Benchmark in three orders, with MiniLM as the encoder.

Writes docs/figures/text.json. Each training leaves its figures in docs/figures/text_runs.json, which is committed. Settings
were chosen on a validation part of the training texts (--one with --more, order 1, seed 1993).

    rows       sdlora, lora, ewc: trained set after set; joint: all sets at once, with the low-rank budget of all tasks
    heads      aligned: the shipped head, fitted again after each task; plain: rows as they were trained with their task
               frozen, first task: aligned heads and RanPAC on features that do not move any more
    last       accuracy over all classes and all test texts after the last task; forgetting, average anytime: see method.py
    own        mean over the sets of the accuracy among the set's own classes, as the literature has it

SDLORA_EDGE_DATA says where text_cl.zip lies. Argument: the folder with MiniLM's config.json, model.safetensors and tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import figures
import method_heads
import numpy as np
import runs
from method import spread

SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
RUNS = figures.FIGURES / "text_runs.json"
ORDERS = {
    "1": ("agnews", "dbpedia", "amazon", "yelp"),
    "2": ("yelp", "dbpedia", "agnews", "amazon"),
    "3": ("dbpedia", "amazon", "yelp", "agnews"),
}
SEEDS = (1993, 1994, 1995)
TRAIN, TEST = 2000, 500
"""texts of each set"""
COMMON: dict[str, Any] = {"tasks": 1, "max_tokens": 64, "precision": "bf16"}
"""the rest are the defaults for texts"""
ROWS: dict[str, dict[str, Any]] = {
    "sdlora": {},
    "lora": {"method": "lora"},
    "ewc": {"method": "lora"},
    "joint": {"rank": "40"},
}
STILL = {"joint": {"frozen": 0}, "sdlora": {"first task": 1}}
"""features that do not move any more: by the row whose training has them, the task after which"""
HEADS = {"correct": "aligned", "plain_correct": "plain"}


def extracted(folder: Path, seed: int) -> None:
    """The sets as folders with train.jsonl and test.jsonl, and `all`, which holds the same texts."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    with zipfile.ZipFile(SHARED / "text_cl.zip") as archive:
        for name in ORDERS["1"]:
            for split, all_of in lines.items():
                own = archive.read(f"{name}/{split}.jsonl").decode().splitlines()
                random = np.random.RandomState(seed if split == "train" else 0)
                own = [own[i] for i in random.permutation(len(own))]
                chosen = own[: TEST if split == "test" else TRAIN]
                (folder / name).mkdir(exist_ok=True)
                (folder / name / f"{split}.jsonl").write_text("\n".join(chosen))
                all_of += chosen
    (folder / "all").mkdir(exist_ok=True)
    for split, all_of in lines.items():
        (folder / "all" / f"{split}.jsonl").write_text("\n".join(all_of))


def one(order: str, row: str, seed: int, model: str, more: dict[str, Any]) -> dict[str, Any]:
    """Train one row, and score it on every set."""
    if row == "ewc":
        import ewc  # noqa: F401  from now on the loss has its term
    from sdlora_edge.train.loop import add_task, train
    from sdlora_edge.train.settings import Settings

    names = ("all",) if row == "joint" else ORDERS.get(order) or order.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        extracted(folder, seed)
        own = {"backbone": model, "seed": seed, "data": str(folder / names[0])}
        run = train(Settings.of(**COMMON | ROWS[row] | more | own), folder / "run")
        for name in names[1:]:
            run = add_task(run.path, folder / name, name)
        metrics = run.metrics
        found: dict[str, Any] = {"heads": scored(run, folder, row, bool(more.get("validate")))}
        for matrix, head in HEADS.items():
            found["heads"][f"{row} {head}"] |= {
                "seconds_per_task": float(np.mean([entry["seconds"] for entry in metrics])),
                "packet_bytes": float(np.mean([entry["packet_bytes"] for entry in metrics[1:] or metrics])),
            }  # fmt: skip
            anytime = [100 * sum(r) / sum(n) for r, n in zip(metrics[-1][matrix], metrics[-1]["counted"], strict=True)]  # fmt: skip
            found["heads"][f"{row} {head}"]["average_anytime"] = float(np.mean(anytime))
        return found


def scored(run: Any, folder: Path, row: str, validate: bool) -> dict[str, Any]:
    """{head: {"last", "own", and the accuracy of each set among its classes}} of the newest state, in percent."""
    from sdlora_edge.train import splits
    from sdlora_edge.train.evaluator import Evaluator
    from sdlora_edge.train.score import Learned

    learned = Learned.of(run)
    train, test, rows = [], [], []
    names = (
        [Path(entry["source"]).name for entry in run.metrics] if row != "joint" else [*ORDERS["1"]]
    )
    for name in names:
        source = splits.load_for(run.config, str(folder / name))
        part = splits.part(source, name, source.classes, (), run.config)
        rows.append(np.array([learned.state.classes.index(c) for c in source.classes]))
        for texts, into in ((part.train, train), (part.test if validate else source.test, test)):
            decoded = splits.decode(texts, source.classes, run.preprocessing, need=True)
            into.append(splits.Decoded(decoded.pixels, rows[-1][decoded.targets]))

    def accuracy(features: list[np.ndarray], head: Any) -> dict[str, float]:
        weight, bias = head
        right, own = 0, {}
        for name, texts, known, seen in zip(names, test, rows, features, strict=True):
            logits = seen[:, : weight.shape[1]] @ weight.T + bias
            right += int((logits.argmax(axis=1) == texts.targets).sum())
            own[name] = 100 * float(
                (known[logits[:, known].argmax(axis=1)] == texts.targets).mean()
            )
        last = 100 * right / sum(map(len, test))
        return {"last": last, "own": float(np.mean([*own.values()])), **own}

    moved = Evaluator(run, learned.weights)
    features = [moved.features(texts) for texts in test]
    found = {f"{row} {label}": accuracy(features, learned.heads()[head]) for head, label in HEADS.items()}  # fmt: skip
    for name, task in STILL.get(row, {}).items() if not validate else ():
        evaluator = Evaluator.at(run, task)
        of_train, of_test = (
            [evaluator.features(texts) for texts in part] for part in (train, test)
        )
        fitted = method_heads.statistics_of([x[None] for x in of_train], [t.targets for t in train])
        found[f"{name} aligned"] = accuracy(of_test, fitted.discriminant())
        last = run.kept.plain[0].shape[1]
        seen = [
            (x[None], t.targets, y, u.targets)
            for x, t, y, u in zip(of_train, train, of_test, test, strict=True)
        ]
        found[f"{name} ranpac"] = {"last": method_heads.ranpac(seen, last)}
    return found


def collect(model: Path) -> dict[str, Any]:
    """Means over seeds, by order and row; the gap closed from the frozen encoder to joint training."""
    every = runs.kept(RUNS)
    table: dict[str, Any] = {}
    for order in ORDERS:
        rows: dict[str, Any] = {}
        for row in ROWS:
            keys = [key_of(order, row, seed) for seed in SEEDS]
            if found := [every[key]["heads"] for key in keys if key in every]:
                rows |= {head: {"seeds": len(found)} | spread([f[head] for f in found]) for head in found[0]}  # fmt: skip
        if {"sdlora aligned", "joint aligned"} <= rows.keys():
            table[f"order {order}"] = rows

    def last(rows: dict[str, Any], head: str) -> float:
        return float(rows[head]["last"][0])

    gaps, gains, packets = {}, [], []
    for order, rows in table.items():
        joint = max(last(rows, "joint aligned"), last(rows, "joint plain"))
        low = last(rows, "frozen aligned")
        gaps[order] = (last(rows, "sdlora aligned") - low) / (joint - low)
        gains.append(last(rows, "sdlora aligned") - last(rows, "sdlora plain"))
        packets.append(rows["sdlora aligned"]["packet_bytes"][0])
    weights = (model / "model.safetensors").stat().st_size
    latency = json.loads((figures.FIGURES / "inference_text.json").read_text())["minilm"]["1"]["1"]
    return {
        "settings": COMMON,
        "train_texts_per_set": TRAIN,
        "test_texts_per_set": TEST,
        "seeds": SEEDS,
        "orders": ORDERS,
        "gap_closed": round(float(np.mean([*gaps.values()])), 3),
        "gap_closed_by_order": gaps,
        "aligned_minus_plain": round(float(np.mean(gains)), 2),
        "packet_bytes": round(float(np.mean(packets))),
        "packet_over_model": round(float(np.mean(packets)) / weights, 6),
        "latency_100_over_constants": latency["tasks_100_over_constants"],
        **table,
    }


def key_of(order: str, row: str, seed: int) -> str:
    """Joint training has no order, nor has the frozen encoder."""
    return f"joint {seed}" if row == "joint" else f"order {order} {row} {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the encoder")
    parser.add_argument("--orders", nargs="*", default=list(ORDERS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument(
        "--one",
        nargs=3,
        metavar=("ORDER|SETS", "ROW", "SEED"),
        help="train this alone, and print it",
    )
    parser.add_argument(
        "--more", type=json.loads, default={}, help="other settings, as JSON; with --one"
    )
    parser.add_argument("--collect", action="store_true", help="train nothing")
    given = parser.parse_args()
    if given.one:
        order, row, seed = given.one
        print(json.dumps(one(order, row, int(seed), given.model, given.more)))
        return
    if not given.collect:
        keys = {key_of(o, r, s): (o, r, str(s)) for s in given.seeds for r in given.rows for o in given.orders}  # fmt: skip
        runs.train(RUNS, keys, lambda key: json.loads(runs.call(key, __file__, given.model, "--one", *keys[key]).splitlines()[-1]))  # fmt: skip
    packages = ("torch", "transformers", "numpy")
    print(
        figures.write(
            "text", "make bench-text MODEL=FOLDER", collect(Path(given.model)), packages=packages
        )
    )


if __name__ == "__main__":
    main()

"""Rewrite the marked tables of docs/benchmarks.md and docs/platforms.md.

A benchmark writes docs/figures/NAME.json, and the tables are made of these files. So figures never
drift. `--check` only says whether the tables differ.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PROVIDERS = DOCS / "guides" / "execution-providers.md"
BENCHMARKS, PLATFORMS, FIGURES = DOCS / "benchmarks.md", DOCS / "platforms.md", DOCS / "figures"
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "numpy", "securesystemslib")


def write(
    name: str,
    command: str,
    values: dict[str, Any],
    folder: Path = FIGURES,
    packages: tuple[str, ...] = PACKAGES,
) -> Path:
    """Write docs/figures/NAME.json: what was measured, how, when, and with which versions."""
    facts = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, CPU",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p).split("+")[0] for p in packages},
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | values, indent=1) + "\n")
    return path


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right. head: "first | second"."""
    columns = head.split(" | ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def loop(figure: dict[str, Any]) -> str:
    head = (
        "task | host accuracy | device accuracy | "
        "same class | largest logit difference | packet | applied in"
    )
    rows = []
    for row in figure["tasks"]:
        shipped = f"{row['packet_bytes']:,} B" if row["packet_bytes"] else "(the bundle)"
        rows.append(
            [
                str(row["task"]),
                f"{100 * row['host_accuracy']:.1f} %",
                f"{100 * row['device_accuracy']:.1f} %",
                f"{row['same_top']} of {row['images']}",
                f"{row['max_logit_difference']:.1e}",
                shipped,
                f"{row['apply_ms']:.0f} ms" if row["packet_bytes"] else "",
            ]
        )
    return table(head, rows) + f"\n\nThe whole model: {figure['model_bytes']:,} bytes."


def step_cost(figure: dict[str, Any]) -> str:
    head = (
        "model | task 1 | task 5 / task 1 | "
        "task 10 / task 1 | task 20 / task 1 | task 20 / plain LoRA"
    )
    head += " | loop over tasks, 20 / 1 | memory, 20 / 1"
    names = {"vit_tiny": "ViT-Tiny", "vit_base": "ViT-B/16"}
    keys = [
        "task5_over_task1",
        "task10_over_task1",
        "task20_over_task1",
        "task20_over_peft",
        "loop_task20_over_task1",
    ]
    rows = []
    for key, name in names.items():
        if row := figure.get(key):
            title = f"{name}, {row['image_size']} px, batch {row['batch']}"
            ratios = [f"{row[k]:.2f}" for k in (*keys, "memory_task20_over_task1")]
            rows.append([title, f"{row['ms']['sdlora_1']:.0f} ms", *ratios])
    return table(head, rows) + "".join(f"\n\n{part}" for part in epochs(figure))


def epochs(figure: dict[str, Any]) -> list[str]:
    """The table of whole epochs, and how it was made if not with the rest."""
    head = "whole epoch, image files included | precision | ours | timm and peft | ours / timm"
    head += " | a task of one epoch"
    names = {
        "vit_tiny": "ViT-Tiny",
        "vit_base": "ViT-B/16",
        "vit_base_compiled": "ViT-B/16, compiled",
    }
    rows = []
    for key, name in names.items():
        for side, row in figure.get("epoch", {}).get(key, {}).items():
            speeds = [f"{row[f'{who}_images_per_second']:.0f} images/s" for who in ("ours", "timm")]
            ratios = [f"{row[k]:.2f}" for k in ("over_timm", "first_epoch_over_timm")]
            title = f"{name}, {side} px, batch {row['batch']}"
            rows.append([title, row["precision"], *speeds, *ratios])
    made = figure.get("epoch_made_by")
    return [table(head, rows), *([f"Epochs: `{made}`."] if made else [])] if rows else []


METHOD_ROWS = {
    "frozen": "frozen backbone, plain head",
    "frozen aligned": "frozen backbone, aligned head, last features",
    "frozen ranpac": "frozen backbone, RanPAC, last features",
    "frozen wide": "frozen backbone, aligned head",
    "first task aligned": "adapted in the first task only, aligned head, last features",
    "first task ranpac": "adapted in the first task only, RanPAC, last features",
    "first task wide": "adapted in the first task only, aligned head",
    "lora": "one LoRA that every task trains further, plain head",
    "lora aligned": "one LoRA that every task trains further, aligned head",
    "ewc": "one LoRA with EWC (EWC-LoRA), plain head",
    "ewc aligned": "one LoRA with EWC (EWC-LoRA), aligned head",
    "authors": "the authors' settings, plain head",
    "authors aligned": "the authors' settings, aligned head",
    "fixed": "old magnitudes not trained, plain head",
    "fixed aligned": "old magnitudes not trained, aligned head",
    "rr": "RR (rank 10, 8 from task 4, 6 from task 8), plain head",
    "rr aligned": "RR, aligned head",
    "kd": "KD, plain head",
    "kd aligned": "KD, aligned head",
    "sdlora": "SD-LoRA, plain head (the paper's method)",
    "sdlora aligned": "SD-LoRA, aligned head",
    "default": "the default, but with its plain head",
    "default last features": "the default, but with last features",
    "default aligned": "**the default: SD-LoRA, aligned head, turned images**",
    "default true means": "the default with true class means (nobody has them)",
    "joint": "joint training, plain head",
    "joint aligned": "joint training, aligned head",
    "joint turned": "joint training, turned images, plain head",
    "joint turned aligned": "joint training, turned images, aligned head",
}
METHOD_SETS = {
    "omniglot": "Omniglot, 8 tasks of 17",
    "caltech101": "Caltech-101, 10 tasks of 10 or 11",
    "pacs": "PACS, 4 domains of 7 classes",
    "cifar100": "CIFAR-100, 10 tasks of 10",
}


def method(figure: dict[str, Any]) -> str:
    """The table of each set, and below it calibration and unknown images."""

    def cell(row: dict[str, Any], column: str, unit: str = " %") -> str:
        if column not in row:
            return ""
        mean, deviation = row[column]
        return f"{mean:.1f} ± {deviation:.1f}{unit}"

    parts = []
    for name, title in METHOD_SETS.items():
        if name not in figure:
            continue
        head = f"{title} | last | average anytime | forgetting | seconds a task | packet"
        rows = []
        for key, label in METHOD_ROWS.items():
            if (row := figure[name].get(key)) is None:
                continue
            if key == "kd":
                label += f" ({sum(row['absorbed'])} of {row['tasks']} absorbed)"
            if row["seeds"] < len(figure["seeds"]):
                label += f" ({row['seeds']} seed{'s' * (row['seeds'] > 1)})"
            cells = [cell(row, c) for c in ("last", "average_anytime", "forgetting")]
            cells.append(f"{row['seconds_per_task'][0]:.0f}" if "seconds_per_task" in row else "")
            size = f"{row['packet_bytes'][0] / 1000:.0f} kB" if "packet_bytes" in row else ""
            rows.append([label, *cells, size])
        closed = f"Of the gap from frozen to joint, the default closes {100 * figure['gap_closed'][name]:.0f} %."
        if name in (turned := figure.get("gap_closed_turned", {})):
            closed += (
                f" If joint training sees turned images too, it closes {100 * turned[name]:.0f} %."
            )
        parts.append(table(head, rows) + f"\n\n{closed}")
    return "\n\n".join([*parts, *answers(figure)])


def answers(figure: dict[str, Any]) -> list[str]:
    """What the default's answers are worth on each set."""
    head = "the default | calibration error after the last task | known images accepted"
    head += " | AUROC: later classes | another dataset | black, white, noise rejected"
    rows = []
    for name, title in METHOD_SETS.items():
        if "calibration" not in figure.get(name, {}):
            continue
        ece, unknown = figure[name]["calibration"]["ece"], figure[name]["unknown"]
        later = f"{unknown['later_classes'][0]:.1f} %" if "later_classes" in unknown else ""
        rows.append(
            [
                title.partition(",")[0],
                f"{ece[0]:.1f} ± {ece[1]:.1f} points",
                f"{100 * unknown['accepted'][0]:.1f} %",
                later,
                f"{unknown['other_dataset'][0]:.1f} %",
                f"{100 * unknown['black_and_noise_rejected'][0]:.1f} %",
            ]
        )
    return [table(head, rows)] if rows else []


TEXT_SETS = {"agnews": "AG News", "dbpedia": "DBpedia", "amazon": "Amazon", "yelp": "Yelp"}
TEXT_ROWS = {
    "frozen aligned": "frozen encoder, aligned head",
    "frozen ranpac": "frozen encoder, RanPAC, last features",
    "first task aligned": "adapted in the first task only, aligned head",
    "first task ranpac": "adapted in the first task only, RanPAC, last features",
    "lora plain": "one LoRA that every task trains further, plain head",
    "lora aligned": "one LoRA that every task trains further, aligned head",
    "ewc plain": "one LoRA with EWC (EWC-LoRA), plain head",
    "ewc aligned": "one LoRA with EWC (EWC-LoRA), aligned head",
    "sdlora plain": "SD-LoRA, plain head (the paper's method)",
    "sdlora aligned": "**SD-LoRA, aligned head**",
    "joint plain": "joint training, plain head",
    "joint aligned": "joint training, aligned head",
}


def text(figure: dict[str, Any]) -> str:
    """A table for each order, and the four figures that the product promises."""
    parts = []
    for number, order in figure["orders"].items():
        if f"order {number}" not in figure:
            continue
        sets = [TEXT_SETS[name] for name in order]
        head = f"{', then '.join(sets)} | all classes | own classes | " + " | ".join(sets)
        rows = []
        for key, label in TEXT_ROWS.items():
            if (row := figure[f"order {number}"].get(key)) is None:
                continue
            if row["seeds"] < len(figure["seeds"]):
                label += f" ({row['seeds']} seed{'s' * (row['seeds'] > 1)})"
            both = [
                f"{m:.1f} ± {d:.1f} %" for m, d in (row[c] for c in ("last", "own") if c in row)
            ]
            rows.append([label, *both, *(f"{row[n][0]:.1f} %" for n in order if n in row)])
            rows[-1] += [""] * (3 + len(sets) - len(rows[-1]))
        closed = 100 * figure["gap_closed_by_order"][f"order {number}"]
        parts.append(
            table(head, rows) + f"\n\nIn this order SD-LoRA closes {closed:.0f} % of the gap."
        )
    summary = [
        ["gap closed, mean of the orders", f"{100 * figure['gap_closed']:.0f} %"],
        ["aligned head minus plain head", f"{figure['aligned_minus_plain']:.1f} points"],
        ["a packet over model.safetensors", f"1/{1 / figure['packet_over_model']:.0f}"],
    ]
    if latency := figure.get("latency_100_over_constants"):
        summary.append(["a prediction after 100 tasks, over constants", f"{latency:.3f}"])
    return "\n\n".join([*parts, table("over all orders | figure", summary)])


def inference(figure: dict[str, Any]) -> str:
    columns = {
        "tasks_1": "1 task",
        "tasks_20": "20 tasks",
        "tasks_100": "100 tasks",
        "constants_bundle_100": "100, as constants",
        "branches_20": "branches, 20",
        "branches_100": "branches, 100",
        "torch": "torch",
    }
    names = {"vit_tiny": "ViT-Tiny", "vit_base": "ViT-B/16", "minilm": "MiniLM-L6"}
    cells = {
        (name, threads, batch): cell
        for key, name in names.items()
        for threads, by_batch in figure.get(key, {}).items()
        for batch, cell in by_batch.items()
    }
    shown = {
        k: c for k, c in columns.items() if all(f"{k}_over_constants" in x for x in cells.values())
    }
    rows = [
        [
            *key,
            f"{cell['constants_ms']:.1f} ms",
            *(f"{cell[f'{k}_over_constants']:.2f}" for k in shown),
        ]
        for key, cell in cells.items()
    ]
    return table(" | ".join(["model | threads | inputs | constants", *shown.values()]), rows)


def unknown_cost(figure: dict[str, Any]) -> str:
    head = (
        "model | prediction, no unknown score | with it | the same, head on the last features alone"
    )
    rows = []
    for key, name in {"vit_tiny": "ViT-Tiny, 96 px", "vit_base": "ViT-B/16, 224 px"}.items():
        cell = figure[key]
        ratios = [f"{cell[f'{k}_over_without']:.3f}" for k in ("with", "last")]
        rows.append([name, f"{cell['without_ms']:.2f} ms", *ratios])
    return table(head, rows)


def precision(figure: dict[str, Any]) -> str:
    head = (
        "target, precision | ViT-Tiny | latency | "
        "Omniglot: agreement | accuracy | Caltech-101: agreement | accuracy"
    )
    head += " | ViT-B/16 | latency"
    rows = []
    for target, title in {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}.items():
        for name, row in figure[target].items():
            cells = [f"{title}, {name}"]
            for model in ("vit_tiny", "vit_base"):
                whole = figure[target]["fp32"][model]["bytes"]
                smaller = f" ({whole / row[model]['bytes']:.1f} x)" if name != "fp32" else ""
                cells += [
                    f"{row[model]['bytes'] / 1e6:.1f} MB{smaller}",
                    f"{row[model]['ms']:.1f} ms ({row[model]['over_fp32']:.2f})",
                ]
            shares = [
                f"{100 * row[data][key]:.1f} %"
                for data in ("omniglot", "caltech101")
                for key in ("agreement", "accuracy")
            ]
            rows.append([*cells[:3], *shares, *cells[3:]])
    return table(head, rows)


def chain(figure: dict[str, Any]) -> str:
    names = {"vit_tiny_patch16_224": "ViT-Tiny, 96 px", "vit_base_patch16_224": "ViT-B/16, 96 px"}
    names["efficientnet_lite0"] = "EfficientNet-Lite0, 96 px"
    rows = [
        [title, *(f"{figure[model][t]['largest_difference']:.1e}" for t in ("onnx", "executorch"))]
        for model, title in names.items()
    ]
    return table("model | ONNX Runtime | ExecuTorch", rows)


def packet(figure: dict[str, Any]) -> str:
    head = "encoding | ViT-Tiny: packet | largest weight error | accuracy | ViT-B/16: packet"
    tiny, base = figure["vit_tiny"], figure["vit_base"]
    rows = []
    for name, row in tiny["encodings"].items():
        accuracy = f"{100 * row['after']:.1f} %"
        rows.append(
            [
                name,
                f"{row['bytes']:,} B",
                f"{row['weight_error']:.1e}",
                accuracy,
                f"{base['encodings'][name]['bytes']:,} B",
            ]
        )
    others = {
        "bsdiff_bytes": "bsdiff of the two models",
        "zstd_patch_bytes": "`zstd -19 --patch-from`",
        "model_bytes": "the whole model",
    }
    for key, label in others.items():
        rows.append(
            [
                label,
                f"{tiny[key]:,} B" if key in tiny else "not measured",
                "",
                "",
                f"{base[key]:,} B" if key in base else "not measured",
            ]
        )
    shipped = tiny["encodings"]["fp16"]
    share = tiny["old_rows"] * tiny["bytes_per_old_row"] / shipped["bytes"]
    without = shipped["after_without_old_rows"]
    note = (
        f"ViT-Tiny: the packet of the last of 8 tasks, with {tiny['new_rows']} new classes. "
        f"It changes {tiny['old_rows']} rows of known classes too, in "
        f"{tiny['old_rows'] * tiny['bytes_per_old_row'] / 1000:.1f} kB: {100 * share:.0f} % of the "
        f"fp16 packet. Without them the accuracy after it would be {100 * without:.1f} instead of "
        f"{100 * shipped['after']:.1f} %."
    )
    if sizes := base.get("bytes"):
        encodings = ("fp16", "int8", "int4")
        more = [
            [key, *(f"{row[e] / 1000:.0f} kB" for e in encodings)] for key, row in sizes.items()
        ]
        title = "ViT-B/16: features, known classes, rank of the step | " + " | ".join(encodings)
        note += "\n\n" + table(title, more)
    return table(head, rows) + "\n\n" + note


def faults(figure: dict[str, Any]) -> str:
    head = (
        "scenario | operations | cuts | disks left | "
        "cuts after a kill | disks left | restarts | damaged"
    )
    keys = [
        "operations",
        "points",
        "states",
        "points_after_a_kill",
        "states_after_a_kill",
        "restarts",
        "problems",
    ]
    rows = [[row["scenario"], *(f"{row[key]:,}" for key in keys)] for row in figure["scenarios"]]
    return table(
        head,
        [*rows, ["all", *(f"{sum(row[key] for row in figure['scenarios']):,}" for key in keys)]],
    )


def _one_by_one(figure: dict[str, Any]) -> list[list[str]]:
    """No row for a figure from before it was measured."""
    spent = figure.get("apply_100_packets_one_by_one_s")
    return [["the same packets, each alone", f"{spent:.1f} s"]] if spent else []


def device(figure: dict[str, Any]) -> str:
    def mega(name: str) -> str:
        return f"{figure[name] / 1e6:.1f} MB"

    stored = figure["store_bytes_100_tasks"]
    rows = [
        [
            "apply one packet, whole",
            f"{figure['apply_ms']:.0f} ms (longest {figure['apply_ms_longest']:.0f})",
        ],
        ["of this: signature, digest and tensors verified", f"{figure['verify_ms']:.1f} ms"],
        ["of this: merge", f"{figure['merge_ms']:.0f} ms"],
        [
            f"of this: the canary's inference, {figure['canary_images']} images",
            f"{figure['canary_ms']:.0f} ms",
        ],
        ["longest pause of a predictor by the swap", f"{figure['pause_ms_p100']:.2f} ms"],
        [
            "longest wait for the same thing without updates",
            f"{figure['reference_ms_p100_without_updates']:.2f} ms",
        ],
        [
            "one prediction, nothing beside it",
            f"{figure['predict_ms']:.0f} ms (longest {figure['predict_ms_longest']:.0f})",
        ],
        [
            "one prediction beside updates, which take their share of the cores",
            f"{figure['predict_ms_beside_updates']:.0f} ms "
            f"(longest {figure['predict_ms_beside_updates_longest']:.0f})",
        ],
        ["adapted weights", mega("adapted_bytes")],
        ["memory while applying, over steady", mega("peak_over_steady_bytes")],
        [
            'memory while applying with `swap="in_place"`, over steady',
            mega("in_place_peak_over_steady_bytes"),
        ],
        [
            'longest wait of a predictor with `swap="in_place"`',
            f"{figure['in_place_wait_ms_p100']:.0f} ms",
        ],
        ["steady memory of the process", mega("steady_bytes")],
        [
            "cold open to first answer, no packet",
            f"{figure['open_to_first_answer_ms_0_packets'] / 1000:.2f} s",
        ],
        [
            "cold open to first answer, 100 packets",
            f"{figure['open_to_first_answer_ms_100_packets'] / 1000:.2f} s",
        ],
        ["100 packets in one go", f"{figure['apply_100_packets_s']:.1f} s"],
        *_one_by_one(figure),
        ["merge of 100 tasks", f"{figure['merge_100_tasks_s']:.2f} s"],
        [
            "store after 100 tasks",
            f"{stored['bundle'] / 1e6:.0f} MB bundle, {stored['packets'] / 1e6:.0f} MB packets",
        ],
    ]
    title = f"{figure['model']}, {figure['threads']} threads"
    return table(f"{title} | ", rows)


def matrix(figure: dict[str, Any]) -> str:
    head = " | ".join(["Python", "dependencies", "onnxruntime", "numpy", *figure["bundles"]])
    rows = [
        [
            row["python"],
            row["kind"],
            *(row["versions"][n] for n in ("onnxruntime", "numpy")),
            *row["found"].values(),
        ]
        for row in figure["cells"]
    ]
    return table(head, rows)


def fleet(figure: dict[str, Any]) -> str:
    cut = figure["cut_link"]
    rows = [
        ["a look without news", f"1 request, {figure['idle_poll_bytes']:,} bytes received"],
        [
            "a week without news, a look every 5 minutes",
            f"{figure['idle_bytes_a_week'] / 1e6:.1f} MB",
        ],
        [
            "a look that brings a packet, metadata and packet",
            f"{figure['news_bytes_per_device']:,} bytes (most {figure['news_bytes_most']:,})",
        ],
        ["looks until all that are online have a packet", str(figure["rounds_to_all"])],
        [
            "devices that tried the bad packet before it was paused",
            f"{100 * figure['bad_packet_share_touched']:.2f} %",
        ],
        ["offline devices that caught up in their first look", f"{figure['caught_up']:,}"],
        ["power cuts in the middle of a sync", f"{figure['power_cuts']:,}"],
        ["devices that are not in the last state at the end", str(figure["stuck_devices"])],
        [
            "devices that change if all online keys are stolen",
            str(figure["online_keys_stolen_devices_changed"]),
        ],
        [
            "reports stored; refused",
            f"{figure['reports']:,}; {figure['refused_reports']:,}",
        ],
        [
            "a bundle over a link that is cut every 100 kB",
            f"{cut['bundle_bytes']:,} bytes in {cut['requests']} requests, "
            f"{cut['received']:,} bytes received",
        ],
    ]
    title = f"{figure['devices']:,} devices, {' and '.join(figure['servers'])}"
    return table(f"{title} | ", rows)


def agent(figure: dict[str, Any]) -> str:
    def pair(name: str) -> list[str]:
        return [f"{figure[f'{p}_{name}ms']:.1f} ms" for p in ("p50", "p99")]

    rows = [
        ["over HTTP, while updates come in", *pair("")],
        ["over HTTP, without updates", *pair("quiet_")],
        ["`Device.predict` in a program, while updates come in", *pair("in_process_")],
        ["`Device.predict` in a program, without updates", *pair("in_process_quiet_")],
    ]
    title = f"{figure['requests_per_s']:g} requests a second, ViT-Tiny at {figure['image_size']} px"
    return (
        table(f"{title} | median | 99th percentile", rows)
        + f"\n\n{figure['updates']} updates, {figure['requests']:,} requests: {figure['failed']} "
        f"failed, {figure['mixed']} mixed the classes of two generations. Resident memory: "
        f"{figure['rss_mb']:.0f} MB, growth over {figure['minutes']:g} min of load "
        f"{figure['rss_growth_mb']:+.1f} MB. From the start of the process to the first answer: "
        f"{figure['cold_start_s']:.2f} s."
    )


Tables = dict[str, Callable[[dict[str, Any]], str]]


def providers(figure: dict[str, Any]) -> str:
    head = (
        "precision | computed by | one image | beside the CPU with constants | "
        "open a store | an update | largest logit difference"
    )
    rows = [
        [
            cell["precision"],
            name,
            f"{one['ms']:.1f} ms",
            f"{one['ratio']:.2f}",
            f"{one['open_ms']} ms",
            f"{one['update_ms']} ms",
            f"{one['difference']:.1e}",
        ]
        for cell in figure["cells"]
        for name, one in cell["contestants"].items()
    ]
    return table(head, rows)


def web(figure: dict[str, Any]) -> str:
    head = "JavaScript device | "
    rows = [
        ["test vectors passed", f"{figure['vectors_passed']} of {figure['vectors']}"],
        ["sabotages caught", f"{figure['sabotages_caught']} of {figure['sabotages']}"],
        ["largest logit difference to Python", f"{figure['max_logit_difference']:.1e}"],
        ["lines of code in web/src", str(figure["lines"])],
        [
            "ViT-Tiny, 224 px, one image, one thread: onnxruntime-node",
            f"{figure['native_ms']:.0f} ms",
        ],
        ["the same, onnxruntime-web (wasm)", f"{figure['wasm_ms']:.0f} ms"],
        ["wasm / native", f"{figure['wasm_over_native']:.1f}"],
    ]
    versions = ", ".join(f"{name} {version}" for name, version in figure["npm"].items())
    return table(head, rows) + f"\n\nNode {figure['node'].removeprefix('v')}, {versions}."


TABLES: Tables = {
    "loop": loop,
    "step_cost": step_cost,
    "method": method,
    "chain": chain,
    "unknown_cost": unknown_cost,
    "fleet": fleet,
    "precision": precision,
    "inference": inference,
    "inference_text": inference,
    "text": text,
    "packet": packet,
    "faults": faults,
    "device": device,
    "agent": agent,
    "web": web,
}

PAGES: dict[Path, Tables] = {
    BENCHMARKS: TABLES,
    PLATFORMS: {"matrix": matrix},
    PROVIDERS: {"providers": providers},
}


def rendered(page: Path) -> str:
    """The page with every marked table made anew."""
    text = page.read_text()
    for name, render in PAGES[page].items():
        if not (FIGURES / f"{name}.json").exists():
            continue  # not measured yet
        figure = json.loads((FIGURES / f"{name}.json").read_text())
        body = render(figure)
        versions = ", ".join(f"{p} {v}" for p, v in figure["versions"].items())
        machine = f"{figure['machine']}; Python {figure['python']}, {versions}"
        note = f"Made by `{figure['command']}` on {figure['date']} ({machine})."
        marked = re.compile(rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)", re.S)
        new = rf"\g<1>{body}\n\n{note}\n\g<2>"
        text, count = marked.subn(new, text)
        if count != 1:
            raise SystemExit(
                f"{page.name} has {count} places marked figures:{name}; there must be one"
            )
    return text


def main() -> None:
    for page in PAGES:
        new = rendered(page)
        if "--check" not in sys.argv:
            page.write_text(new)
        elif new != page.read_text():
            raise SystemExit(
                f"the tables of {page.name} differ from docs/figures: run make figures"
            )


if __name__ == "__main__":
    main()

"""A run's report as one HTML page that needs nothing else: no script, no font, no image from anywhere, nothing fetched.

Every value comes from `report.summary`; numbers stand in the cells, so colour is never the only carrier.
"""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from .parts import (
    MISSING,
    STYLE,
    Raw,
    bar,
    heat_map,
    line_chart,
    note,
    percent,
    section,
    size,
    table,
    text,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""the browser itself refuses whatever would be fetched or run"""
TITLES = {
    "last": ("last accuracy", "over all classes, after the last task"),
    "average_anytime": (
        "average anytime",
        "mean over tasks of the accuracy on all classes seen by then",
    ),
    "forgetting": ("forgetting", "mean fall of a task from its best; lower is better"),
    "backward_transfer": (
        "backward transfer",
        "mean change of a task since it was learned; higher is better",
    ),
}


def page(run: dict[str, Any]) -> str:
    """The page of a summary (see `report.summary`), with `thumbnails` (see `report.confused_images`) where it has them."""
    title = f"sdlora-edge report: {PurePath(run['path']).name}"
    parts = [
        _headline(run),
        _curve(run),
        _matrix(run),
        _tasks(run),
        _magnitudes(run),
        _packets(run),
        _domains(run),
    ]
    classes = f'<div class="pair">{_per_class(run)}{_confusions(run)}</div>'
    body = "".join([*parts, classes, _thumbnails(run), _settings(run)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f'<body><header><h1>{text(title)}</h1><p class="sub">{text(_line(run))}</p></header>\n<main>{body}</main></body></html>\n'
    )


def _line(run: dict[str, Any]) -> str:
    settings = {name: value for group in run["config"].values() for name, value in group.items()}
    return f"{settings['backbone']} on {settings['data']}, seed {settings['seed']}. {run['path']}, lineage {run['lineage'][:12]}"


def _headline(run: dict[str, Any]) -> str:
    scores = run["scores"]
    facts = [(*TITLES[name], f"{100 * scores[name]:.2f} %") for name in TITLES if name in scores]
    facts.append(("tasks", "learned one after another", str(run["task_count"])))
    facts.append(("classes", "known by now", str(len(run["classes"]))))
    sizes = [task["packet_bytes"] for task in run["tasks"] if task["packet_bytes"] is not None]
    if sizes:
        share = f"{100 * max(sizes) / run['model_bytes']:.2g} % of the model"
        facts.append(("largest packet", f"{max(sizes)} bytes, {share}", size(max(sizes))))
    facts.append(
        ("model", f"{run['model_bytes']} bytes: backbone and head", size(run["model_bytes"]))
    )
    cells = (
        f'<div title="{text(tip)}"><dt>{text(name)}</dt><dd>{text(value)}</dd><dt>{text(tip)}</dt></div>'
        for name, tip, value in facts
    )
    return section("Results", *_missing(run), f"<dl>{''.join(cells)}</dl>")


def _missing(run: dict[str, Any]) -> list[str]:
    if all(name in run["scores"] for name in TITLES):
        return []
    gone = ", ".join(str(task) for task in run["unreadable"])
    why = (
        f"at some scoring, the test images of task {gone} could not be read"
        if gone
        else "the run does not hold them"
    )
    return [
        note(
            f"Last accuracy, average anytime, forgetting and backward transfer over all tasks are not known: {why}."
        )
    ]


def _curve(run: dict[str, Any]) -> str:
    series = [("this run", run["accuracy"])]
    notes = ["Accuracy on the test images of all classes seen so far."]
    if run["frozen"]:
        series.append(
            ("frozen reference: the backbone as it was, with its own aligned head", run["frozen"])
        )
    else:
        notes.append("No frozen reference: this run did not record one.")
    if any(value is None for value in run["accuracy"]):
        notes.append("A gap: some of the test images could not be read.")
    ticks = [str(task["task"]) for task in run["tasks"]]
    label = "Accuracy over tasks: " + ", ".join(
        f"{t}: {percent(v)} %" for t, v in zip(ticks, run["accuracy"])
    )
    return section("Accuracy over tasks", note(" ".join(notes)), line_chart(label, ticks, series))


def _matrix(run: dict[str, Any]) -> str:
    tasks = run["tasks"]
    columns = [(str(task["task"]), f"task {task['task']}: {task['name']}") for task in tasks]
    rows = []
    for task, cells in zip(tasks, run["matrix"]):
        tip = f"after task {task['task']}, on task "
        line = [
            (v, percent(v), f"{tip}{c[0]}: " + ("not known" if v is None else f"{percent(v)} %"))
            for v, c in zip(cells, columns)
        ]
        rows.append((_titled(task), line))
    words = f"Percent right on each task's test images (column), after each task (row), out of all classes known by then.{_range(rows)}"
    gone = (
        [note(f"{MISSING}: the test images could no longer be read.")] if run["unreadable"] else []
    )
    return section(
        "Accuracy matrix", note(words), heat_map("Accuracy matrix", "after", columns, rows), *gone
    )


def _titled(task: dict[str, Any]) -> str:
    plain = task["name"] in (f"task {task['task']}", str(task["task"]))
    return str(task["name"]) if plain else f"{task['task']} {task['name']}"


def _range(rows: list[Any]) -> str:
    shown = [(cell[0], cell[1]) for _, cells in rows for cell in cells if cell[0] is not None]
    return f" Shaded from {min(shown)[1]} to {max(shown)[1]}." if shown else ""


def _magnitudes(run: dict[str, Any]) -> str:
    if not run["magnitudes"]:
        return ""
    count = len(run["magnitudes"])
    most = (
        max((abs(mean) for spreads in run["magnitudes"] for mean, _, _ in spreads), default=0.0)
        or 1.0
    )
    digits = min(max(2 - math.floor(math.log10(most)), 2), 9)
    rows = []
    for t, spreads in enumerate(run["magnitudes"], 1):
        cells = [
            (mean, f"{mean:.{digits}f}", _magnitude_tip(t, k, mean, low, high))
            for k, (mean, low, high) in enumerate(spreads, 1)
        ]
        rows.append((f"task {t}", cells))
    several = any(low != high for spreads in run["magnitudes"] for _, low, high in spreads)
    words = "How strongly each direction (column) counts after each task (row)." + (
        " Mean over the projections; lowest and highest in the tooltip." if several else ""
    )
    columns = [(str(k), f"direction of task {k}") for k in range(1, count + 1)]
    return section(
        "Magnitudes",
        note(words + _range(rows)),
        heat_map("Magnitudes over tasks", "after", columns, rows),
    )


def _magnitude_tip(t: int, k: int, mean: float, low: float, high: float) -> str:
    spread = f", {low:.4g} to {high:.4g} over the projections" if low != high else ""
    return f"after task {t}, direction {k}: {mean:.4g}{spread}"


def _tasks(run: dict[str, Any]) -> str:
    optional = {
        "frozen": "frozen %",
        "rank": "rank",
        "absorbed": "absorbed",
        "packet_bytes": "packet bytes",
    }
    used = [name for name in optional if any(task[name] is not None for task in run["tasks"])]
    domain = any(task["domain"] for task in run["tasks"])
    head = [
        "task",
        "name",
        *["domain"] * domain,
        "classes",
        "training",
        "test",
        "seconds",
        "all %",
        *(optional[name] for name in used),
    ]
    rows = []
    for task in run["tasks"]:
        names = [task["task"], task["name"], *[task["domain"]] * domain]
        counts = [
            len(task["classes"]),
            task["training_images"],
            task["test_images"],
            task["seconds"],
            percent(task["accuracy"]),
        ]
        rows.append([*names, *counts, *(_optional(name, task[name]) for name in used)])
    return section("Tasks", table("Tasks", head, rows, words=2 + domain))


def _optional(name: str, value: Any) -> str:
    if value is None:
        return MISSING
    return (
        percent(value)
        if name == "frozen"
        else ("yes" if value else "no")
        if name == "absorbed"
        else str(value)
    )


def _packets(run: dict[str, Any]) -> str:
    sizes = [
        (task, task["packet_bytes"]) for task in run["tasks"] if task["packet_bytes"] is not None
    ]
    if not sizes:
        return ""
    largest = max(count for _, count in sizes)
    rows = [
        [_titled(task), count, f"{100 * count / run['model_bytes']:.2g} %", bar(count / largest)]
        for task, count in sizes
    ]
    return section(
        "Packets", table("Bytes of each packet", ["task", "bytes", "of the model", ""], rows)
    )


def _domains(run: dict[str, Any]) -> str:
    if not run["domains"]:
        return ""
    columns = ("hter", "far", "frr")
    rows = [
        [d["domain"], *(percent(d.get(c), 2) for c in columns), _number(d.get("threshold"))]
        for d in run["domains"]
    ]
    words = "HTER = (FAR + FRR) / 2 of the newest state, in percent; lower is better."
    return section(
        "Domains",
        note(words),
        table("HTER by domain", ["domain", "HTER %", "FAR %", "FRR %", "threshold"], rows),
    )


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _how(run: dict[str, Any], what: str) -> str:
    command = f"<code>sdlora-edge eval --run {text(run['path'])} --data FOLDER</code>"
    return note(
        Raw(f"This run did not record {text(what)}. To score a folder of images: {command}")
    )


def _per_class(run: dict[str, Any]) -> str:
    if run["per_class"] is None:
        return section("Classes", _how(run, "the accuracy of each class"))
    rows = [
        [name, percent(right / total), f"{right} of {total}", bar(right / total)]
        for name, right, total in run["per_class"]
    ]
    words = "After the last task, worst first."
    return section(
        "Classes", note(words), table("Accuracy by class", ["class", "%", "right", ""], rows)
    )


def _confusions(run: dict[str, Any]) -> str:
    if run["confusions"] is None:
        return section("Confusions", _how(run, "its confusions"))
    if not run["confusions"]:
        return section("Confusions", note("None: every test image was answered rightly."))
    totals = {name: total for name, _, total in run["per_class"] or []}
    rows = [
        [
            truth,
            predicted,
            count,
            f"{100 * count / totals[truth]:.0f} %" if totals.get(truth) else MISSING,
        ]
        for truth, predicted, count in run["confusions"]
    ]
    words = "After the last task, most frequent first; share of the class's own images."
    return section(
        "Confusions",
        note(words),
        table("Confusions", ["class", "taken for", "times", "share"], rows, words=2),
    )


def _thumbnails(run: dict[str, Any]) -> str:
    if "thumbnails" not in run:
        return ""
    if run["confusions"] is None:
        return section("Confused images", _how(run, "its confusions"))
    if not run["thumbnails"]:
        return section(
            "Confused images",
            note("None: there is no confusion, or the images can no longer be read."),
        )
    figures = []
    for pair in run["thumbnails"]:
        words = f"{pair['truth']}, taken for {pair['predicted']}"
        shots = "".join(
            f'<img src="{text(uri)}" width="64" height="64" alt="{text(words)}" title="{text(name)}">'
            for name, uri in pair["images"]
        )
        figures.append(f"<figure>{shots}<figcaption>{text(words)}</figcaption></figure>")
    return section(
        "Confused images",
        note("As the model sees them."),
        f'<div class="shots">{"".join(figures)}</div>',
    )


def _settings(run: dict[str, Any]) -> str:
    groups = dict(run["config"]) | ({"Made with": run["versions"]} if run["versions"] else {})
    tables = []
    for group, values in groups.items():
        rows = [[name, _setting(value)] for name, value in values.items()]
        tables.append(
            f"<div><h3>{text(group)}</h3>{table(f'Settings: {group}', ['setting', 'value'], rows, words=2)}</div>"
        )
    return section("Settings", f'<div class="pair">{"".join(tables)}</div>')


def _setting(value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return shown or MISSING

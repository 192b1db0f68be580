"""What a report tells of a run, gathered into one plain dictionary; `report_html` draws it."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import InputError
from ...storage import atomic
from .. import splits
from ..evaluator import logits_of
from ..images import ImageFile
from ..run import Run
from ..score import test_images
from . import html

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCORES = ("last", "average_anytime", "forgetting", "backward_transfer")
PAIRS, IMAGES, SIDE = 6, 4, 64
"""thumbnails: of so many confusions, so many images each, of so many pixels"""


def write(run: Run, out: Path, thumbnails: bool = False) -> dict[str, Any]:
    """Write the page. Returns the summary, with `report` (the page's path) and `bytes` (its size), without the thumbnails.

    Raises InputError where the run has no scored task yet, StorageError where the page cannot be written.
    """
    value = summary(run)
    shown = value | (
        {"thumbnails": confused_images(run, value["confusions"] or [])} if thumbnails else {}
    )
    page = html.page(shown).encode()
    atomic.write(out, page)
    return {"report": str(out), "bytes": len(page), **value}


def summary(run: Run) -> dict[str, Any]:
    """All that the page shows but the thumbnails, fit for JSON. Fractions are in [0, 1]; None is what a run does not tell.

    scores: those of SCORES that are known. unreadable: numbers of tasks whose test images were gone at some scoring.
    matrix: R[i][j]. accuracy, frozen: A_i, None where an image was missing. tasks: a row for every scored task.
    magnitudes: for each task from 1, a list of [mean, lowest, highest] over the projections, one for each direction.
    per_class: [class, right, total], worst first. confusions: [truth, predicted, count].
    domains: [{domain, hter, far, frr, threshold}] of the newest state.
    """
    if not run.metrics:
        raise InputError(
            f"{run.path} has no scored task yet: go on with sdlora-edge train --run {run.path}"
        )
    last, state = run.metrics[-1], run.states[-1]
    correct, totals = last["correct"], last["totals"]
    accuracy = _over_tasks(correct, totals)
    frozen = _over_tasks(last["frozen_correct"], totals) if "frozen_correct" in last else None
    per_class = last.get("per_class")
    return {
        "path": str(run.path),
        "lineage": run.lineage,
        "scores": {name: last[name] for name in SCORES if name in last},
        "unreadable": [
            e["task"]
            for j, e in enumerate(run.metrics)
            if any(row[j] is None for row in correct[j:]) or not totals[j]
        ],
        "task_count": len(run.updates),
        "classes": list(state.classes),
        "model_bytes": sum(t.numel() * t.element_size() for t in run.backbone.state_dict().values())
        + state.head_weight.nbytes
        + state.head_bias.nbytes,
        "matrix": [
            [None if c is None or not n else c / n for c, n in zip(row, totals)] for row in correct
        ],
        "accuracy": accuracy,
        "frozen": frozen if frozen and any(v is not None for v in frozen) else None,
        "tasks": [
            _task(entry, a, f)
            for entry, a, f in zip(run.metrics, accuracy, frozen or [None] * len(accuracy))
        ],
        "magnitudes": [_spread(state.magnitudes) for state in run.states[1:]],
        "per_class": per_class
        and sorted(
            ([c, *counts] for c, counts in per_class.items()), key=lambda row: row[1] / row[2]
        ),
        "confusions": last.get("confusions"),
        "domains": [{"domain": name, **found} for name, found in (last.get("hter") or {}).items()],
        "config": {group.capitalize(): table for group, table in run.config.to_dict().items()},
        "versions": _recorded(run.path),
    }


def confused_images(run: Run, confusions: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """[{truth, predicted, images: [(name, data URI)]}] of the worst confusions, as the model sees the images.

    Read from the run's sources once more and scored with its last state; pairs whose images are gone are left out.
    """
    task = run.states[-1].task
    by_class: dict[str, list[ImageFile]] = {}
    for found in test_images(run, task).values():
        for label, own in (found or {}).items():
            by_class.setdefault(label, []).extend(own)
    wanted = [(truth, predicted) for truth, predicted, _ in confusions[:PAIRS]]
    guesses = {
        truth: _guesses(run, truth, by_class.get(truth, []))
        for truth in dict.fromkeys(truth for truth, _ in wanted)
    }
    pairs = []
    for truth, predicted in wanted:
        shown = [
            (name, _jpeg(pixels)) for name, pixels, guess in guesses[truth] if guess == predicted
        ][:IMAGES]
        if shown:
            pairs.append({"truth": truth, "predicted": predicted, "images": shown})
    return pairs


def _guesses(
    run: Run, label: str, images: Sequence[ImageFile]
) -> list[tuple[str, np.ndarray, str]]:
    """(name, pixels, predicted class) of the readable images of a class, under the last state."""
    state = run.states[-1]
    decoded = [
        (p.name, splits.decode({label: [p]}, [label], run.preprocessing, need=False).pixels)
        for p in images
    ]
    readable = [(name, pixels[0]) for name, pixels in decoded if len(pixels)]
    if not readable:
        return []
    guess = logits_of(
        run, state.task, run.weights(state.task), np.stack([pixels for _, pixels in readable])
    ).argmax(axis=1)
    return [(name, pixels, state.classes[g]) for (name, pixels), g in zip(readable, guess)]


def _jpeg(pixels: np.ndarray) -> str:
    """uint8 (size, size, 3) to a data URI of SIDE x SIDE pixels."""
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _over_tasks(
    correct: Sequence[Sequence[int | None]], totals: Sequence[int]
) -> list[float | None]:
    """A_i after each task i; None where a cell of its row is missing."""
    found: list[float | None] = []
    for i, row in enumerate(correct):
        right, images = [c for c in row[: i + 1] if c is not None], sum(totals[: i + 1])
        found.append(sum(right) / images if len(right) == i + 1 and images else None)
    return found


def _task(entry: dict[str, Any], accuracy: float | None, frozen: float | None) -> dict[str, Any]:
    optional = ("rank", "absorbed", "residual", "packet_bytes")
    domains = entry.get("domains") or entry.get("domain") or []
    return {
        "task": entry["task"],
        "name": entry["name"],
        "classes": list(entry["classes"]),
        "domain": domains if isinstance(domains, str) else ", ".join(domains),
        "training_images": entry["training_images"],
        "seconds": entry["seconds"],
        "test_images": entry["totals"][-1],
        "accuracy": accuracy,
        "frozen": frozen,
        **{name: entry.get(name) for name in optional},
    }


def _spread(magnitudes: np.ndarray) -> list[list[float]]:
    """(t,) or (t, projections) to [mean, lowest, highest] for each direction."""
    table = magnitudes.reshape(len(magnitudes), -1)
    return [[float(row.mean()), float(row.min()), float(row.max())] for row in table]


def _recorded(path: Path) -> dict[str, str]:
    """What the run was made with, where its config.toml says so."""
    try:
        found = tomllib.loads(atomic.read(path / "config.toml").decode()).get("recorded", {})
    except ValueError as error:
        raise InputError(f"{path / 'config.toml'} is not a TOML file: {error}") from error
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}

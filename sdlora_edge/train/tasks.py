"""The files of one task in a run's folder: written all at once, read one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import InputError, UsageError
from ..formats.canonical import dump_json
from ..formats.encoding import Factors
from ..formats.head_update import HeadUpdate
from ..method.calibration import Calibration
from ..method.head import FeatureStatistics
from ..method.sdlora import Head
from ..shortage import verdict
from ..state import TaskUpdate, factor_tensors, factors_from
from ..storage import atomic
from .folder import METRICS, STATE, STATISTICS

EXACT, FROZEN, PLAIN, CALIBRATION = "exact.", "frozen.", "plain.", "calibration."
"""prefixes in the statistics file; the statistics under the newest weights have none"""
BLANK = "blank"


@dataclass(frozen=True, eq=False)
class Kept:
    """What the host keeps of all classes so far, besides what it ships.

    frozen: feature statistics under W_0, for the frozen reference. plain: every head row as its
    task trained it, whatever head is shipped; it sees the backbone's own features alone. aligned:
    feature statistics under the newest weights; None unless the head is aligned. calibration: what
    was measured on held-out images. blank: float32 (n, d), features of images that show nothing
    (`Preparation.blank`) under the newest weights.
    """

    frozen: FeatureStatistics
    plain: Head
    aligned: FeatureStatistics | None = None
    calibration: Calibration = field(default_factory=Calibration.empty)
    blank: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A task that was learned, complete: what `Run.append` stores.

    exact: the factors as they were learned, float32, before they were encoded. metrics: the content
    of metrics.json.
    """

    update: TaskUpdate
    kept: Kept
    exact: Mapping[str, Factors] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None


def folder_of(run: Path, task: int) -> Path:
    """The folder of a task."""
    return run / "tasks" / f"{task:03d}"


def write_task(run: Path, result: TaskResult, digest: str) -> None:
    """Write a task: its folder appears whole or not at all.

    digest: S_t, by which `read_update` notices that a task does not follow from the tasks before
    it. Raises UsageError if the run has this task already.
    """
    update, kept = result.update, result.kept
    facts = {
        "task": update.task,
        "name": update.name,
        "classes": update.classes,
        "retired": update.retired,
        "renamed": update.renamed,
        "deltas": update.deltas.tolist(),
        "digest": digest,
    }
    if (target := folder_of(run, update.task)).exists():
        raise UsageError(f"{run} has learned task {update.task} since it was opened: open it again")
    tensors = {f"{FROZEN}{name}": array for name, array in kept.frozen.__dict__.items()}
    tensors |= {f"{PLAIN}weight": kept.plain[0], f"{PLAIN}bias": kept.plain[1]}
    tensors |= {f"{EXACT}{name}": array for name, array in factor_tensors(result.exact).items()}
    tensors |= {f"{CALIBRATION}{name}": a for name, a in kept.calibration.__dict__.items()}
    tensors |= {BLANK: kept.blank, **(kept.aligned.__dict__ if kept.aligned else {})}
    with atomic.new_folder(target) as new:
        save(new / STATE, update.tensors(), {"task": dump_json(facts).decode()})
        save(new / STATISTICS, tensors, {})
        if result.metrics is not None:
            atomic.write(new / METRICS, metrics_json(result.metrics))


def read_update(
    run: Path, task: int, projections: Sequence[str], encoding: str
) -> tuple[TaskUpdate, str]:
    """(a task as it is shipped, the digest that it was written with).

    Raises InputError if its file is damaged.
    """
    path = folder_of(run, task) / STATE
    tensors, facts = load(path)
    try:
        names = json.loads(facts["task"])
        update = TaskUpdate(
            names["task"],
            names["name"],
            tuple(names["classes"]),
            np.array(names["deltas"], np.float64),
            HeadUpdate.from_tensors(tensors),
            factors_from(tensors, projections, encoding=encoding),
            tuple(names["retired"]),
            tuple((row, name) for row, name in names["renamed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not the state of a task ({error!r}): restore it from a backup"
        ) from error
    return update, names["digest"]


def read_kept(run: Path, task: int) -> Kept:
    """What was kept when a task was written. Raises InputError if its file is damaged."""
    path = folder_of(run, task) / STATISTICS
    tensors, _ = load(path, without=EXACT)
    try:
        plain = tensors[f"{PLAIN}weight"], tensors[f"{PLAIN}bias"]
        aligned = _statistics(tensors, "") if "means" in tensors else None
        measured = (tensors[f"{CALIBRATION}{f.name}"] for f in fields(Calibration))
        frozen, calibration = _statistics(tensors, FROZEN), Calibration(*measured)
        return Kept(frozen, plain, aligned, calibration, tensors[BLANK])
    except KeyError as error:
        raise InputError(
            f"{path} lacks {error}: another version made this run; begin a new one"
        ) from error


def read_learned(run: Path, task: int, projections: Sequence[str]) -> dict[str, Factors]:
    """The factors of a task, float32, before they were encoded."""
    return factors_from(load(folder_of(run, task) / STATISTICS)[0], projections, EXACT)


def metrics_json(metrics: Mapping[str, Any]) -> bytes:
    """The content of metrics.json."""
    return json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n"


def save(path: Path, tensors: Mapping[str, np.ndarray], facts: dict[str, str]) -> None:
    """Write a safetensors file. facts: its metadata."""
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    atomic.write(path, safetensors.numpy.save(ordered, metadata=facts))


def load(path: Path, without: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: (tensors, metadata).

    without: leave out tensors whose name begins so.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            names = [n for n in names if without is None or not n.startswith(without)]
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise verdict(error, InputError(f"{path} cannot be read: {error}")) from error


def _statistics(tensors: Mapping[str, np.ndarray], prefix: str) -> FeatureStatistics:
    return FeatureStatistics(
        *(tensors[f"{prefix}{name}"] for name in ("means", "scatter", "counts"))
    )

"""What a report tells about a run, read from the run's folder without loading a model."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from ...errors import InputError
from ...inputs.modality import kind_of, of_kind
from ...results import Result
from ...shortage import verdict
from ...state import extended
from ...storage import atomic
from .. import config, folder
from ..reliability import Acceptance, Bin, Calibration

SCORES = ("last", "average_anytime", "forgetting", "backward_transfer")
SHOWN_SKIPPED = 200
"""how many skipped files are listed; all of them are counted"""


@dataclass(frozen=True)
class TaskRow(Result):
    """One scored task. Accuracies are fractions in [0, 1]; None is what the run did not record.

    Attributes:
        accuracy: A_t, over the test images of all tasks up to this one.
        frozen: The same for the unchanged backbone with its own aligned head.
        images: Test images behind both.
        losses: Mean training loss of each epoch; empty if the run did not record it.
        ece: Expected calibration error, over the same images.
        accepted: Share of the same images that counts as known.
        residual: Share of all that was learned that dropping the direction would lose (KD).
    """

    task: int
    name: str
    classes: tuple[str, ...]
    domain: str
    training_images: int
    test_images: int
    seconds: float
    accuracy: float | None
    frozen: float | None
    images: int
    losses: tuple[float, ...]
    ece: float | None
    accepted: float | None
    rank: int | None
    absorbed: bool | None
    residual: float | None
    packet_bytes: int | None


@dataclass(frozen=True)
class ClassScore(Result):
    """Test images of a class, and how many of them the newest state answers correctly.

    Attributes:
        training: Images that the class was learned from; None if the run did not record it.
    """

    name: str
    right: int
    total: int
    training: int | None = None


@dataclass(frozen=True)
class Confusion(Result):
    """How often the newest state takes an image of one class for another class."""

    truth: str
    predicted: str
    count: int


@dataclass(frozen=True)
class Spread(Result):
    """The magnitude of one direction over the projections."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class DomainErrors(Result):
    """Error rates of a binary decision on one domain, as fractions (see `metrics.hter`)."""

    domain: str
    hter: float | None
    far: float | None
    frr: float | None
    threshold: float | None


@dataclass(frozen=True)
class SkippedFile(Result):
    """A file of the dataset that the run does not use."""

    file: str
    label: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Summary(Result):
    """All numbers of a report. Fractions are in [0, 1]; None is what the run did not record.

    Attributes:
        state: Digest of the newest state, as `device status` prints it; empty before task 1.
        scores: Those of `SCORES` that are known.
        unreadable: Tasks whose test images could not be read at some scoring.
        model_bytes: Size of backbone and head.
        matrix: R[i][j], accuracy on the images of task j after task i.
        counted: counted[i][j], test images behind R[i][j]; fewer after classes were retired.
        magnitudes: For each task from 1 on, the magnitude of each direction after it.
        per_class: Worst class first; None if the run did not record it.
        confusions: Most frequent first; None if the run did not record them.
        calibration: Of the newest state, over the test images of all tasks.
        unknown: How many of the same images count as known; None without a threshold.
        skipped: Number of skipped files by reason.
        skipped_files: The first `SHOWN_SKIPPED` of them.
        settings: The settings by group.
        versions: What the run was made with.
        noun: What one of the test images is called.
    """

    path: Path
    state: str
    scores: Mapping[str, float]
    unreadable: tuple[int, ...]
    task_count: int
    classes: tuple[str, ...]
    model_bytes: int
    matrix: tuple[tuple[float | None, ...], ...]
    counted: tuple[tuple[int, ...], ...]
    tasks: tuple[TaskRow, ...]
    magnitudes: tuple[tuple[Spread, ...], ...]
    per_class: tuple[ClassScore, ...] | None
    confusions: tuple[Confusion, ...] | None
    calibration: Calibration | None
    unknown: Acceptance | None
    domains: tuple[DomainErrors, ...]
    skipped: Mapping[str, int]
    skipped_files: tuple[SkippedFile, ...]
    settings: Mapping[str, Mapping[str, object]]
    versions: Mapping[str, str]
    noun: str = "image"


def read(path: Path) -> Summary:
    """Read what a report shows of the run in `path`.

    Raises:
        InputError: The folder is not a run, has no scored task yet, or holds a damaged file.
    """
    settings = folder.require_begun(path)
    entries = folder.metrics(path)
    if not entries:
        raise InputError(
            f"{path} has no scored task yet: continue it with sdlora-edge train --run {path}"
        )
    return _summary(path, asdict(settings), entries)


def _summary(
    path: Path, settings: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> Summary:
    last, counted = entries[-1], _counted(entries)
    states = [_state(path, task) for task in range(folder.last_task(path) + 1)]
    skipped = _skipped(path)
    return Summary(
        path=path,
        state=states[-1].digest,
        scores={name: last[name] for name in SCORES if name in last},
        unreadable=_unreadable(entries),
        task_count=len(states) - 1,
        classes=tuple(c for c in folder.classes(path, len(states) - 1) if c is not None),
        model_bytes=_model_bytes(path, states),
        matrix=_matrix(last["correct"], counted),
        counted=counted,
        tasks=_tasks(entries, counted),
        magnitudes=_magnitudes([state.deltas for state in states[1:]]),
        per_class=_per_class(last.get("per_class"), folder.training_images(entries, last["task"])),
        confusions=_confusions(last.get("confusions")),
        calibration=_calibration(last.get("calibration")),
        unknown=_acceptance(last.get("unknown")),
        domains=tuple(_domain(*item) for item in (last.get("hter") or {}).items()),
        skipped=Counter(file.reason for file in skipped),
        skipped_files=tuple(skipped[:SHOWN_SKIPPED]),
        settings=settings,
        versions=config.recorded_in(path / folder.CONFIG),
        noun=of_kind(kind_of(settings["backbone"]["backbone"])).noun,
    )


def _counted(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], ...]:
    """Runs in which no class can retire recorded `totals` alone: the images of each task."""
    totals = entries[-1]["totals"]
    rows = entries[-1].get("counted") or [totals[: i + 1] for i in range(len(totals))]
    return tuple(tuple(row) for row in rows)


def _unreadable(entries: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    correct = entries[-1]["correct"]
    return tuple(
        entry["task"]
        for j, entry in enumerate(entries)
        if any(row[j] is None for row in correct[j:])
        or (entry["classes"] and not entry["totals"][-1])
    )


def _matrix(
    correct: Sequence[Sequence[int | None]], counted: Sequence[Sequence[int]]
) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(None if c is None or not n else c / n for c, n in zip(*rows))
        for rows in zip(correct, counted)
    )


def _tasks(
    entries: Sequence[Mapping[str, Any]], counted: Sequence[Sequence[int]]
) -> tuple[TaskRow, ...]:
    last = entries[-1]
    accuracy = _over_tasks(last["correct"], counted)
    frozen = _over_tasks(last.get("frozen_correct") or [[None]] * len(counted), counted)
    return tuple(
        TaskRow(
            task=entry["task"],
            name=str(entry["name"]),
            classes=tuple(entry["classes"]),
            domain=", ".join(entry.get("domains") or ()),
            training_images=entry["training_images"],
            test_images=entry["totals"][-1],
            seconds=entry["seconds"],
            accuracy=accuracy[i],
            frozen=frozen[i],
            images=sum(counted[i]),
            losses=tuple(entry.get("losses") or ()),
            ece=(entry.get("calibration") or {}).get("ece"),
            accepted=(entry.get("unknown") or {}).get("accepted"),
            rank=entry.get("rank"),
            absorbed=entry.get("absorbed"),
            residual=entry.get("residual"),
            packet_bytes=entry.get("packet_bytes"),
        )
        for i, entry in enumerate(entries)
    )


def _over_tasks(
    correct: Sequence[Sequence[int | None]], counted: Sequence[Sequence[int]]
) -> list[float | None]:
    """A_i after each task i; None if a cell of its row is missing."""
    found: list[float | None] = []
    for row, totals in zip(correct, counted):
        right, images = [c for c in row if c is not None], sum(totals)
        found.append(sum(right) / images if len(right) == len(totals) and images else None)
    return found


def _calibration(found: Mapping[str, Any] | None) -> Calibration | None:
    if found is None:
        return None
    return Calibration(
        found["ece"], found["temperature"], tuple(Bin(**one) for one in found["bins"])
    )


def _acceptance(found: Mapping[str, Any] | None) -> Acceptance | None:
    return None if found is None else Acceptance(found["accepted"], found["threshold"])


def _per_class(
    counts: Mapping[str, Sequence[int]] | None, training: Mapping[str, int]
) -> tuple[ClassScore, ...] | None:
    if counts is None:
        return None
    scores = [
        ClassScore(name, right, total, training.get(name))
        for name, (right, total) in counts.items()
    ]
    return tuple(sorted(scores, key=lambda score: score.right / score.total))


def _confusions(found: Sequence[Sequence[Any]] | None) -> tuple[Confusion, ...] | None:
    return None if found is None else tuple(Confusion(*confusion) for confusion in found)


def _domain(name: str, found: Mapping[str, float]) -> DomainErrors:
    return DomainErrors(name, *(found.get(key) for key in ("hter", "far", "frr", "threshold")))


def _magnitudes(deltas: Sequence[Sequence[Any]]) -> tuple[tuple[Spread, ...], ...]:
    """From the deltas of each task t, (t,) or (t, projections), as `state.advance` does."""
    rows, magnitudes = [], np.zeros(0)
    for delta in deltas:
        step = np.array(delta, np.float64)
        magnitudes = extended(magnitudes, step) + step
        table = magnitudes.reshape(len(magnitudes), -1)
        rows.append(tuple(Spread(float(r.mean()), float(r.min()), float(r.max())) for r in table))
    return tuple(rows)


class _State(NamedTuple):
    """What the file of a task's state says about it, besides its factors."""

    deltas: list[Any]
    digest: str
    rows: int
    width: int


def _state(path: Path, task: int) -> _State:
    file = path / "tasks" / f"{task:03d}" / folder.STATE
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            found = json.loads(opened.metadata()["task"])
            shape = opened.get_slice("head.new.weight").get_shape()
        return _State(found["deltas"], str(found["digest"]), *shape)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise verdict(error, InputError(f"{file} cannot be read: {error}")) from error


def _model_bytes(path: Path, states: Sequence[_State]) -> int:
    """Bytes of all tensors of the backbone, and of the head in float32."""
    head = 4 * sum(state.rows for state in states) * (states[0].width + 1)
    return _tensor_bytes(path / folder.BACKBONE) + head


def _tensor_bytes(file: Path) -> int:
    """A safetensors file is 8 bytes with the size of its header, the header, then the tensors."""
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        return file.stat().st_size - 8 - header
    except OSError as error:
        raise verdict(error, InputError(f"{file} cannot be read: {error}")) from error


def _skipped(path: Path) -> list[SkippedFile]:
    """The rows of the run's skipped.csv; none in a run that has no such file."""
    if not (path / folder.SKIPPED).exists():
        return []
    lines = csv.reader(atomic.read(path / folder.SKIPPED).decode(errors="replace").splitlines())
    return [SkippedFile(*row) for row in list(lines)[1:] if len(row) == 4]

"""A run's state on any folder of images: accuracy, by class, the confusions, and HTER where there are two classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..method.sdlora import logits
from . import metrics, splits
from .folder import require_known
from .images import ImageFile, counted
from .run import Run
from .source import Source

log = logging.getLogger("sdlora_edge")
BATCH = 128


def evaluate(
    run: Run, folder: str, task: int | None = None, source: Source | None = None
) -> dict[str, Any]:
    """Score a folder or ZIP of class folders with the state after `task` (default: the last), out of all its classes.

    Which images: see `images_of`. Returns accuracy, correct, total, per_class and confusions as in metrics.json, and for
    runs of exactly two classes `hter` (see `metrics.binary`). Raises UsageError for a class or a task that the run does not know,
    InputError where no image can be read.
    """
    state = run.state(task)
    images, which = images_of(run, folder, source)
    require_known(list(images), run.path, state.task, folder)
    scores, truth = score(run, state.task, images)
    if not len(truth):
        raise InputError(f"{folder} has no readable test image")
    guess = scores.argmax(axis=1)
    result = {
        "run": str(run.path),
        "data": folder,
        "images": which,
        "task": state.task,
        "correct": int((guess == truth).sum()),
        "total": len(truth),
        "accuracy": float((guess == truth).mean()),
        "per_class": metrics.per_class(truth, guess, state.classes),
        "confusions": metrics.confusions(truth, guess, state.classes),
    }
    return result | (
        {"hter": metrics.binary(scores, truth, state.classes)} if len(state.classes) == 2 else {}
    )


def images_of(
    run: Run, folder: str, source: Source | None = None
) -> tuple[dict[str, Sequence[ImageFile]], str]:
    """The test images of a source by class, and in words which they are: those of test/ where there is a split, else all.

    Of a source the run itself was trained on, only those it has not seen in training. Classes without any are left out.
    """
    source = source or splits.load_for(run.config, folder)
    if source.skipped:
        log.warning(
            "%s: files that are not used: %s", folder, counted(p.problem for p in source.skipped)
        )
    if source.is_split:
        chosen, which = dict(source.test), "test/"
    elif source.name in {entry["source"] for entry in run.metrics}:
        chosen, which = dict(source.test), "the run's own test images"
    else:
        chosen, which = {c: [*source.train[c], *source.test[c]] for c in source.classes}, "all"
    return {label: own for label, own in chosen.items() if own}, which


def score(
    run: Run, task: int, images: Mapping[str, Sequence[ImageFile]]
) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32 (N, classes), truth int64 (N,)) under the state after `task`; truth indexes the classes of that state.

    Class by class, so that only one class's images are held decoded.
    """
    state, weights = run.states[task], run.weights(task)
    scores, truth = [np.zeros((0, len(state.classes)), np.float32)], [np.zeros(0, np.int64)]
    for label, own in images.items():
        pixels = splits.decode({label: own}, [label], run.preprocessing, need=False).pixels
        scores.append(logits_of(run, task, weights, pixels))
        truth.append(np.full(len(pixels), state.classes.index(label)))
    return np.concatenate(scores), np.concatenate(truth)


def logits_of(
    run: Run, task: int, weights: Mapping[str, np.ndarray], pixels: np.ndarray
) -> np.ndarray:
    """Decoded images, uint8 (N, size, size, 3), to logits, float32 (N, classes). weights: run.weights(task)."""
    state = run.states[task]
    parts = (
        run.preprocessing.normalise(pixels[start : start + BATCH])
        for start in range(0, len(pixels), BATCH)
    )
    found = [logits(run.backbone, weights, state, batch) for batch in parts]
    return np.concatenate([np.zeros((0, len(state.classes)), np.float32), *found])

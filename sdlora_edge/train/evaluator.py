"""The one scoring loop: images to features and logits under the weights of a state, in batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..inputs.modality import Inputs, parts
from ..method.merged import Merged, logits_of
from ..results import Result
from ..state import TaskState
from . import metrics, reliability, splits, unknown_images
from .files import counted
from .fit import precision
from .folder import names_after, require_known, training_images
from .items import Item
from .kinds import modality
from .metrics import Confusion, Hter
from .reliability import Acceptance, Calibration, Rejection
from .run import Run
from .source import Source
from .splits import Decoded, Images
from .unknown_images import UnknownImages
from .upload import to_device

log = logging.getLogger("sdlora_edge")
BATCH = 128
"""images in a batch, if nothing else is said"""
TOKENS = {"cpu": 32 * 196, "cuda": 256 * 196}
"""in a batch. On a CPU more do not fit its caches: at 224 pixels (196 tokens) each of 128 images
takes 1.2 to 1.3 of the time of each of 32. An accelerator wants many."""


class Evaluator:
    """What a run's model answers under one set of weights, which are uploaded once.

    Args:
        run: Its backbone, preprocessing, precision and workers are used.
        weights: W_t of every adapted weight, {tensor: float32 (rows, columns)}; empty for the
            frozen backbone.
        exact: Compute in float64 instead of the run's precision, for comparison with a device.
    """

    def __init__(self, run: Run, weights: Mapping[str, np.ndarray], exact: bool = False) -> None:
        self.run, self.exact = run, exact
        self.model = Merged(run.backbone, weights, exact, run.features)
        self._upload = modality(run.preprocessing.kind).upload(run.preprocessing, self.model.device)

    @classmethod
    def at(cls, run: Run, task: int, exact: bool = False) -> Evaluator:
        """Under the weights after a task."""
        return cls(run, run.weights(task), exact)

    def features(self, images: Images) -> np.ndarray:
        """What the head sees of each image: float32 (N, features), float64 if exact."""
        batches = images.batches(slices(len(images), self._batch), self.run.config.training.workers)
        return self._features(map(self._upload, batches))

    def features_of(self, inputs: Inputs) -> np.ndarray:
        """The same for what the model reads of them (`Preparation.arrays`)."""
        return self._features(
            tuple(to_device(torch.from_numpy(a), self.model.device) for a in part.values())
            for part in parts(inputs, self._batch)
        )

    def class_features(
        self, images: Mapping[str, Sequence[Item]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (class, features of its readable images).

        The images of one class are decoded at a time.
        """
        for label, decoded in decoded_by_class(self.run, images):
            yield label, self.features(decoded)

    @property
    def _batch(self) -> int:
        """Images in a batch: half as many in float64, which takes twice the memory."""
        tokens = TOKENS[self.model.device.type] // (2 if self.exact else 1)
        return max(1, int(tokens / self.run.preprocessing.tokens))

    def _features(self, batches: Iterator[tuple[Tensor, ...]]) -> np.ndarray:
        empty = np.zeros((0, self.run.states[0].head_weight.shape[1]), np.float32)
        with self._precision():
            return np.concatenate([empty, *(self.model.features(*batch) for batch in batches)])

    def _precision(self) -> AbstractContextManager[None]:
        if self.exact:
            return nullcontext()
        return precision(self.run.backbone, self.run.config.training.precision, self.model.device)


def host_logits(run: Run, task: int, inputs: Inputs) -> np.ndarray:
    """Compute in float64 what the model answers after a task.

    inputs: what `Preparation.arrays` makes of N items. Returns float32 (N, live classes): rows of
    retired classes have no logit.
    """
    state = run.states[task]
    seen = Evaluator.at(run, task, exact=True).features_of(inputs)
    return logits_of(state, seen)[:, state.live]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a state answers to images of classes that it knows.

    Attributes:
        logits: float32 (N, rows).
        known: float64 (N,), how well known each image is (`Confidence.scores`).
        truth: int64 (N,), the row of the image's class.
    """

    logits: np.ndarray
    known: np.ndarray
    truth: np.ndarray


def class_answers(run: Run, state: TaskState, images: Mapping[str, Sequence[Item]]) -> Answers:
    """Answer images of known classes under a state of the run."""
    logits, known = [np.zeros((0, len(state.classes)), np.float32)], [np.zeros(0)]
    truth = [np.zeros(0, np.int64)]
    for label, seen in Evaluator.at(run, state.task).class_features(images):
        logits.append(logits_of(state, seen))
        known.append(known_scores(state, logits[-1], seen))
        truth.append(np.full(len(seen), state.classes.index(label)))
    return Answers(np.concatenate(logits), np.concatenate(known), np.concatenate(truth))


def unknown_scores(run: Run, state: TaskState, images: Sequence[Item]) -> np.ndarray:
    """How well known each readable image is to a state of the run: float64 (N,)."""
    batches = {str(rows[0]): [images[i] for i in rows] for rows in slices(len(images))}
    seen = (found for _, found in Evaluator.at(run, state.task).class_features(batches))
    return np.concatenate(
        [np.zeros(0), *(known_scores(state, logits_of(state, part), part) for part in seen)]
    )


def known_scores(state: TaskState, logits: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`Confidence.scores` of a state: float64 (N,).

    logits: float (N, rows). features: float (N, features).
    """
    if not len(logits):  # a state without a live class has no highest logit
        return np.zeros(0)
    return state.confidence.scores(logits[:, state.live], features)


def decoded_by_class(
    run: Run, images: Mapping[str, Sequence[Item]]
) -> Iterator[tuple[str, Decoded]]:
    """(class, its readable images), decoded one class after the other."""
    for label, own in images.items():
        yield label, splits.decode({label: own}, [label], run.preprocessing, need=False)


def slices(count: int, size: int = BATCH) -> list[np.ndarray]:
    """0..count-1 in order, `size` at a time."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class FewImages(Result):
    """Classes with fewer than `metrics.FEW` images, {class: images}, the fewest first.

    Attributes:
        test: Those that were scored: one answer more or less changes the class's recall a lot.
        training: Those that the run has learned the class from.
    """

    test: Mapping[str, int]
    training: Mapping[str, int]


@dataclass(frozen=True)
class Evaluation(Result):
    """How well a state answers the images of a folder, out of all classes it knows.

    Attributes:
        images: In words, which images of the folder were used.
        classes: How many the state knows.
        per_class: (correct, images) of each class that has images.
        recall: Share of the images of each class that is answered with it, the lowest first.
        few: Classes whose recall says little, and classes that were learned from little.
        confusions: The most frequent first.
        hter: Of a state of two classes, if both have images.
        calibration: Of the probabilities.
        unknown: How many of these images the state accepts as known; a `Rejection` if there are
            unknown images too.
    """

    run: Path
    data: str
    images: str
    task: int
    classes: int
    correct: int
    total: int
    accuracy: float
    per_class: Mapping[str, tuple[int, int]]
    recall: Mapping[str, float]
    few: FewImages
    confusions: tuple[Confusion, ...]
    hter: Hter | None
    calibration: Calibration
    unknown: Acceptance


def evaluate(
    run: Run,
    folder: Path | str,
    task: int | None = None,
    source: Source | None = None,
    unknown: UnknownImages | Path | str | None = None,
) -> Evaluation:
    """Score a folder or ZIP of class folders with the state after `task` (default: the last).

    `images_of` says which images count.

    Args:
        run: The run.
        folder: The folder or ZIP.
        task: Number of the task.
        source: What `plan.evaluation` has returned, if it was called.
        unknown: A folder or ZIP of images of classes that the state does not know, or what
            `plan.unknown` has returned. `unknown_images.find` says which images count.

    Raises:
        UsageError: The run does not know a class or the task.
        InputError: No image can be read.
    """
    state, folder = run.state(task), str(folder)
    images, which = images_of(run, folder, source, state.task)
    require_known(list(images), run.path, state.task, folder)
    if isinstance(unknown, (str, Path)):
        most = run.config.data.max_megapixels * 10**6
        kind = run.preprocessing.kind
        unknown = unknown_images.find(str(unknown), state.names, most, kind)
    found = class_answers(run, state, images)
    noun = run.preprocessing.noun
    if not len(truth := found.truth):
        raise InputError(
            f"{folder} has no readable test {noun}: add {noun}s, or name another folder"
        )
    guess, logits = found.logits.argmax(axis=1), found.logits[:, state.live]
    by_class = metrics.per_class(truth, guess, state.classes)
    return Evaluation(
        run=run.path,
        data=folder,
        images=which,
        task=state.task,
        classes=len(state.names),
        correct=int((guess == truth).sum()),
        total=len(truth),
        accuracy=float((guess == truth).mean()),
        per_class=by_class,
        recall=metrics.recall(by_class),
        few=_few(run, state, by_class),
        confusions=metrics.confusions(truth, guess, state.classes),
        hter=metrics.binary(found.logits, truth, state.classes),
        calibration=reliability.calibrated(state.confidence, logits, guess == truth),
        unknown=_acceptance(run, state, found.known, unknown),
    )


def _few(run: Run, state: TaskState, by_class: Mapping[str, tuple[int, int]]) -> FewImages:
    test = {name: images for name, (_, images) in by_class.items()}
    return FewImages(metrics.few(test), metrics.few(training_images(run.metrics, state.task)))


def _acceptance(
    run: Run, state: TaskState, known: np.ndarray, images: UnknownImages | None
) -> Acceptance:
    """known: float64 (N,), scores of the images of known classes."""
    accepted = reliability.acceptance(state.confidence, known)
    if images is None:
        return accepted
    unknown = unknown_scores(run, state, images.images)
    if not len(unknown):
        noun = run.preprocessing.noun
        raise InputError(
            f"--unknown {images.data} has no readable {noun}: add {noun}s, or name another folder"
        )
    return Rejection(
        accepted.accepted,
        accepted.threshold,
        data=images.data,
        images=len(unknown),
        left_out=images.left_out,
        auroc=reliability.auroc(known, unknown),
        false_accept=reliability.accepted(unknown, accepted.threshold),
        thresholds=reliability.thresholds(known, unknown),
    )


def images_of(
    run: Run, folder: str, source: Source | None = None, task: int | None = None
) -> tuple[dict[str, Sequence[Item]], str]:
    """Choose the images of a source that count: (images by class, in words which they are).

    They are those of test/ if the source is split, else all. Of a source that the run was trained
    on, they are those that it has not seen in training. Classes without images are left out.
    """
    source = source or splits.load_for(run.config, folder)
    if source.skipped:
        reasons = counted(p.problem for p in source.skipped)
        log.warning("%s: files that are not used: %s", folder, reasons)
    if source.is_split:
        chosen, which = dict(source.test), "test/"
    elif source.name in {entry["source"] for entry in run.metrics}:
        chosen, which = dict(source.test), f"the run's own test {source.noun}s"
    else:
        chosen, which = {c: [*source.train[c], *source.test[c]] for c in source.classes}, "all"
    # The source that a run learned from keeps the names that its classes had then.
    names = names_after(run.metrics, source.name, run.state(task).task)
    images = {names.get(label, label): own for label, own in chosen.items() if own}
    return {label: own for label, own in images.items() if label is not None}, which

"""What a model sees in images that it does not know: their features, and its best guesses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..device.answers import Answered, Asked, Prediction, Unanswered, best, prepared
from ..device.device import Device
from ..device.engines import Outputs
from ..errors import InputError, UsageError
from ..formats.bundle import open_bundle
from ..inputs.image import Preprocessing
from ..inputs.modality import IMAGE, Preparation, of_kind
from ..inputs.sizes import MAX_PIXELS
from ..state import TaskState
from ..train.kinds import modality

if TYPE_CHECKING:
    from ..train.run import Run

MOST = 5000
"""images that are sorted at a time: grouping compares each with each"""
GUESSES = 3
BATCH = 32


@dataclass(frozen=True, eq=False)
class Seen:
    """Images as a model sees them.

    Attributes:
        paths: Of the images that can be read.
        answers: What the model answers for each.
        features: float32 (N, features).
        centre: float32 (features,), the mean over the known classes; None if the model has none.
        classes: Names of the classes that the model knows.
        unread: Why each other image is not used.
        kind: What the model reads.
    """

    paths: tuple[Path, ...]
    answers: tuple[Prediction, ...]
    features: np.ndarray
    centre: np.ndarray | None
    classes: tuple[str, ...]
    unread: tuple[str, ...]
    kind: type[Preparation] = Preprocessing

    def preview(self, path: Path) -> tuple[str, bytes]:
        """As `Preparation.preview`."""
        return self.kind.preview(path)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What the page shows in place of pictures; empty if there are pictures."""
        if self.kind.spatial:
            return ()
        found = []
        for path in self.paths:
            try:
                found.append(self.preview(path)[1].decode(errors="replace"))
            except InputError as error:  # it was removed meanwhile
                found.append(str(error))
        return tuple(found)


def images_in(folder: Path, kind: str = IMAGE) -> list[Path]:
    """Every image (or text) in a folder, and in the folders inside.

    Links are not followed: a device that was taken over may have made them, to files of this host.

    Raises:
        InputError: It is no folder, or has no image.
        UsageError: It has too many.
    """
    noun = of_kind(kind).noun
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one with {noun}s")
    found = [file for file in modality(kind).files(folder, follow=False) if not file.problem]
    if not found:
        raise InputError(f"{folder} has no {noun}: name a folder with {noun}s")
    if len(found) > MOST:
        raise UsageError(
            f"{folder} has {len(found)} {noun}s: sort at most {MOST} at a time, "
            "such as those of one week"
        )
    return [folder / file.path for file in found]


def by_bundle(bundle: Path, paths: Sequence[Path]) -> Seen:
    """As a device that was flashed with this bundle sees them. Needs no torch.

    Raises:
        InputError: The bundle is damaged, or no image can be read.
        UsageError: Its model does not tell the features.
    """
    state = open_bundle(bundle).state
    with tempfile.TemporaryDirectory() as scratch:
        device = Device.init(bundle, Path(scratch) / "store")
        answers = device.answer_each(paths, Asked(GUESSES))
        return _seen(state, paths, answers, type(device.preparation))


def by_run(run: Path, paths: Sequence[Path]) -> Seen:
    """As the newest state of a run sees them.

    Raises InputError if the run cannot be read, or no image.
    """
    from ..train.run import Run  # torch, which takes seconds

    opened = Run.open(run)
    state = opened.state(None)
    return _seen(state, paths, _answers_of(opened, state, paths), type(opened.preprocessing))


def _answers_of(
    run: Run, state: TaskState, paths: Sequence[Path]
) -> Iterator[Answered | Unanswered]:
    from ..method.merged import logits_of
    from ..train.evaluator import Evaluator

    evaluator = Evaluator.at(run, state.task)
    for batch in prepared(paths, run.preprocessing, BATCH, MAX_PIXELS):
        readable = [image for image in batch if isinstance(image, np.ndarray)]
        found: Iterator[Answered | Unanswered] = iter(())
        if readable:
            seen = evaluator.features_of(run.preprocessing.arrays(np.stack(readable)))
            answers = best(Outputs(logits_of(state, seen), seen), state, 0, Asked(GUESSES))
            found = (
                Answered(answer, row) if isinstance(answer, Prediction) else answer
                for answer, row in zip(answers, seen, strict=True)
            )
        for image in batch:
            yield next(found) if isinstance(image, np.ndarray) else image


def _seen(
    state: TaskState,
    paths: Sequence[Path],
    answers: Iterator[Answered | Unanswered],
    kind: type[Preparation],
) -> Seen:
    good: list[tuple[Path, Answered]] = []
    unread = []
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, Answered):
            good.append((path, answer))
        else:
            unread.append(str(answer))
    if not good:
        raise InputError(f"no {kind.noun} can be read, such as: {unread[0]}")
    rows = [answer.features for _, answer in good]
    if any(row is None for row in rows):
        raise UsageError(
            "the bundle's model has no output `features`: export it again, or name a run with --run"
        )
    mean = state.confidence.mean
    return Seen(
        tuple(path for path, _ in good),
        tuple(answer.prediction for _, answer in good),
        np.array(rows, np.float32),
        mean.astype(np.float32) if len(mean) else None,
        state.names,
        tuple(unread),
        kind,
    )

"""From a fitted head to what a device gets of it: rows, then what their answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..formats.confidence import Confidence
from ..formats.head_update import Step
from ..inputs.modality import Preparation
from ..method.calibration import Judge
from ..method.head import FeatureStatistics
from ..method.sdlora import Head, zero_head
from ..state import TaskState, TaskUpdate, advance
from .splits import Decoded
from .tasks import Kept


def before_all(features: int) -> TaskState:
    """The state of a run that knows nothing, which task 0 follows."""
    return TaskState(0, "", "", (), np.zeros(0), *zero_head(0, features), {}, Confidence.none(0))


LOST = 0.02
"""what the change of a known row may lose if its rank may grow: a share of how much a logit varies
within a class, in squares"""


def step_for(kept: Kept, head: Head, live: Sequence[int], rank: int, fresh: int = 0) -> Step:
    """How the head's rows are rounded: so that the logits of these statistics are nearest.

    head: the target. rank: enough for the drift. fresh: known classes with new images. Each of them
    moves its row by itself.
    """
    if kept.aligned is None or not len(live):
        return Step(rank, more=fresh)
    rows = head[0][list(live)].astype(np.float64)
    variance = float(((rows @ kept.aligned.covariance()) * rows).sum() / len(rows))
    middle = kept.aligned.means[list(live)].mean(axis=0)
    return Step(rank, kept.aligned.around(live), middle, fresh, LOST * variance)


def with_confidence(before: TaskState, update: TaskUpdate, kept: Kept) -> TaskUpdate:
    """Add to an update what its answers are worth.

    before: the state before it. kept: with the statistics and the calibration after it.
    """
    after = advance(before, update)
    head = after.head_weight, after.head_bias
    judge = Judge(kept.aligned, head, after.live, kept.blank)
    confidence = judge.confidence(kept.calibration)
    return replace(update, head=replace(update.head, confidence=confidence))


def judge_without(
    others: FeatureStatistics | None, plain: Head, live: Sequence[int], blank: np.ndarray
) -> Judge:
    """Of a head that is fitted without the held-out images.

    others: the statistics without them; None for a trained head, `plain`, which never saw them.
    blank: as in `Judge`.
    """
    return Judge(others, others.discriminant(live) if others else plain, live, blank)


def blank_images(prepare: Preparation) -> Decoded:
    """Images that show nothing, by which the unknown score weighs features."""
    pixels = np.concatenate([*prepare.blank(each=4, seed=0).values()])
    return Decoded(pixels, np.zeros(len(pixels), np.int64))

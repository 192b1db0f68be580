"""Learning one task: its direction, its head rows, and what the host keeps of its classes.

There are four ways, by what the task brings:

    several classes   a direction, all magnitudes and the classes' rows are trained
                      (`method.sdlora`)
    a direction       it was learned elsewhere: the classes' rows alone are trained
    one class, alone  nothing is trained, for there is no other class to tell it from: its row is
                      fitted to its features (`FeatureStatistics.beside`)
    no images         nothing is trained or fitted: classes are only retired or renamed
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..formats.canonical import tensors_digest
from ..formats.encoding import Factors, encode
from ..formats.limits import LIMITS
from ..method import absorb
from ..method.authors import AuthorsSDLoRA
from ..method.head import FeatureStatistics
from ..method.lora import OneLoRA
from ..method.sdlora import (
    Directions,
    FixedMagnitudes,
    Head,
    Magnitudes,
    Past,
    ResetMagnitudes,
    SDLoRA,
    SharedA,
    Variant,
)
from ..state import TaskUpdate, changed_rows, extended, factor_tensors
from . import distributed
from .crops import with_crops
from .evaluator import Evaluator
from .fit import Checkpoint, Training, diverged, fit, steps_of, writer
from .lesson import Lesson
from .run import Run
from .settings import Settings
from .shipped import blank_images, judge_without, step_for, with_confidence
from .splits import Decoded
from .tasks import Kept, TaskResult

log = logging.getLogger("sdlora_edge")
Direction = tuple[Mapping[str, Factors], np.ndarray]
"""one that was learned elsewhere: its factors, float32, and the magnitude deltas of `TaskUpdate`"""
NEGLIGIBLE = 1e-4
"""a direction's share of the weights' norm; those of real tasks were 0.005 to 0.02"""
VIEWS, VIEWS_UP_TO = 3, 2000
"""random views of each new image by which the drift is measured, and the most images that is done
with"""
MAGNITUDES = {"carry": Magnitudes(), "reset": ResetMagnitudes(), "fixed": FixedMagnitudes()}
DIRECTIONS = {"free": Directions(), "shared": SharedA()}


def change_classes(lesson: Lesson) -> TaskResult:
    """Make the task that retires and renames classes and learns nothing.

    All other head rows stay as they are.
    """
    run, before = lesson.run, lesson.before
    kept = replace(run.kept, plain=lesson.plain)
    update = _update(lesson, ({}, no_deltas(run)), (before.head_weight, before.head_bias), kept)
    return TaskResult(with_confidence(before, update, kept), kept, {}, {"rank": 0})


def _update(lesson: Lesson, direction: Direction, head: Head, kept: Kept) -> TaskUpdate:
    """The task as it is shipped, but for its confidence. head: the whole head to come near to."""
    factors, deltas = direction
    fresh = int((lesson.rows < len(lesson.known)).sum())
    step = step_for(kept, head, lesson.live, lesson.run.config.method.head_rank, fresh)
    try:
        rows = changed_rows(lesson.before, *head, lesson.retired, step)
    except ValueError as error:
        raise diverged(f"task {lesson.number}", str(error), lesson.run.config) from error
    changes = lesson.retired, lesson.renamed
    return TaskUpdate(lesson.number, lesson.part.name, lesson.new, deltas, rows, factors, *changes)


def learn_task(lesson: Lesson, direction: Direction | None = None) -> TaskResult | None:
    """Learn one task from its images. The rows of classes that the run knows are trained on.

    Returns what `Run.append` takes, without the scores; of torchrun's processes all but the first
    get None.
    """
    run = lesson.run
    device = next(run.backbone.parameters()).device
    # Each task has a random state of its own, so a run that was stopped learns what one that was
    # not stopped learns.
    torch.manual_seed(lesson.seed)
    alone = len(lesson.part.classes) == 1 and run.kept.aligned is not None and direction is None
    if alone:
        direction = {}, no_deltas(run)
    given = _Given.of(lesson, direction) if direction else None
    model = (given.model(lesson) if given else new_model(run, lesson.head)).to(device)
    facts: dict[str, Any] = {}
    if not alone:
        training = _training(lesson, given)
        facts["losses"] = fit(model, lesson.taught, training)
        _warn_if_still(lesson, model)
        model.finish_task()
    if not distributed.first():
        return None
    # Absorption comes before encoding: it decides whether there is a direction to ship. All that
    # follows is computed from what is shipped, for that is what a device has.
    facts |= _absorb(run, model)
    shipped, exact = (given.shipped, given.exact) if given else _learned(lesson, model)
    facts["rank"] = max((f.A.shape[0] for f in shipped[0].values()), default=0)
    update, kept = _taught(lesson, shipped, _with_rows(lesson, model))
    _require_bounded(update, run.config)
    return TaskResult(update, kept, exact, facts)


def _taught(lesson: Lesson, shipped: Direction, plain: Head) -> tuple[TaskUpdate, Kept]:
    """What a learned direction makes of the head, and what the host keeps.

    plain: the plain head, with the rows of the task.
    """
    run, kept, moves = lesson.run, lesson.run.kept, bool(shipped[0]) or bool(shipped[1].any())
    alone = len(lesson.part.classes) == 1 and not moves
    after = Evaluator(run, run.weights_with(*shipped)) if moves else lesson.under_old_weights
    cropped, first = (
        with_crops(evaluator, lesson.images, lesson.seed)
        for evaluator in (after, Evaluator(run, {}))
    )
    seen, targets, classes = cropped[0], lesson.targets, len(lesson.classes)
    unseen = lesson.held_out
    head, others, aligned = plain, None, kept.aligned
    if aligned is not None:
        known, rest = aligned, np.setdiff1d(np.arange(len(seen)), unseen)
        known = _followed(lesson, known, after, seen) if moves else known
        others = known.with_images(cropped[:, rest], targets[rest], classes)
        aligned = others.with_images(cropped[:, unseen], targets[unseen], classes)
        head = _beside(lesson, aligned) if alone else aligned.discriminant(lesson.live)
    frozen = kept.frozen.with_images(first, targets, classes)
    blank = after.features(blank_images(run.preprocessing))
    judge = judge_without(others, plain, lesson.live, blank)
    calibration = judge.measured(kept.calibration, seen[unseen], targets[unseen])
    kept = Kept(frozen, plain, aligned, calibration, blank)
    update = _update(lesson, shipped, head, kept)
    return with_confidence(lesson.before, update, kept), kept


@dataclass(frozen=True, eq=False)
class _Given:
    """A direction that is not trained. shipped: as it is encoded; exact: as it was learned."""

    shipped: Direction
    exact: Mapping[str, Factors]

    @classmethod
    def of(cls, lesson: Lesson, direction: Direction) -> _Given:
        encoding = lesson.run.config.method.encoding
        shipped = {name: encode(f, encoding) for name, f in direction[0].items()}
        return cls((shipped, direction[1]), direction[0])

    def model(self, lesson: Lesson) -> SDLoRA:
        """The model that has the direction as one more old one, and learns nothing but its head."""
        past, (factors, deltas) = lesson.run.past, self.shipped
        magnitudes = extended(past.magnitudes, deltas) + deltas
        known = Past(past.projections, [*past.factors, factors], magnitudes)
        return SDLoRA(lesson.run.backbone, known, lesson.head, Variant(rank=0))


def new_model(run: Run, head: Head) -> SDLoRA:
    """The model that learns the next task by the run's settings. head: its rows to start from."""
    settings, number = run.config, len(run.states)
    variant = Variant(
        settings.method.rank_of(number) if settings.method.method != "frozen" else 0,
        settings.method.magnitude_init,
        MAGNITUDES[settings.method.magnitudes],
        DIRECTIONS[settings.method.directions],
    )
    kind = AuthorsSDLoRA if settings.method.magnitude_norm == "factors" else SDLoRA
    kind = OneLoRA if settings.method.method == "lora" else kind
    return kind(run.backbone, run.past, head, variant)


def no_deltas(run: Run) -> np.ndarray:
    """The magnitude deltas of a task without a direction: zeros (t,) or (t, projections)."""
    settings, tasks = run.config, len(run.states)
    wide = (
        settings.method.magnitude_norm == "factors"
    )  # the authors' norm differs between projections
    return np.zeros((tasks, len(run.projections)) if wide else tasks)


def _training(lesson: Lesson, given: _Given | None) -> Training:
    """How the task is trained.

    Its checkpoint has a key of all that it depends on, so none of another training is taken.
    """
    run, part = lesson.run, lesson.part
    direction = [tensors_digest(factor_tensors(given.shipped[0]))] if given else []
    data = part.source, part.name, part.classes, len(lesson.taught)
    changes = lesson.retired, lesson.renamed
    key = (lesson.number, *data, *changes, lesson.before.digest, run.config, *direction)
    return Training(
        run.config,
        run.preprocessing,
        lesson.number,
        Checkpoint(run.path, *key),
        writer(run.path, run.config),
    )


def _learned(lesson: Lesson, model: SDLoRA) -> tuple[Direction, Mapping[str, Factors]]:
    """(the trained direction as it is shipped, its factors as they were learned)."""
    settings = lesson.run.config
    try:
        return (model.directions(settings.method.encoding), model.deltas()), model.directions(
            "fp32"
        )
    except ValueError as error:
        raise diverged(f"task {lesson.number}", str(error), settings) from error


def _with_rows(lesson: Lesson, model: SDLoRA) -> Head:
    """The plain head with the rows that the model has trained."""
    weight, bias = lesson.plain[0].copy(), lesson.plain[1].copy()
    weight[lesson.rows], bias[lesson.rows] = _numpy(model.head.weight), _numpy(model.head.bias)
    return weight, bias


def _beside(lesson: Lesson, statistics: FeatureStatistics) -> Head:
    """The head with the row of one class fitted. All other rows stay."""
    old = lesson.before.head_weight, lesson.before.head_bias
    return statistics.beside(*old, lesson.rows, lesson.live)


def _followed(
    lesson: Lesson, known: FeatureStatistics, after: Evaluator, seen: np.ndarray
) -> FeatureStatistics:
    """The statistics of old classes under the new weights: they follow the drift.

    seen: features of the new images under the new weights.
    """
    if not len(known.means):
        return known
    chosen, shown = _views(lesson)
    more = Decoded(shown.pixels[len(chosen) :], shown.targets[len(chosen) :])
    moved = np.concatenate([seen[chosen], after.features(more)])
    return known.drifted(lesson.under_old_weights.features(shown), moved)


def _views(lesson: Lesson) -> tuple[np.ndarray, Decoded]:
    """Return which new images the drift is measured on, and these with random views after them.

    They are at most VIEWS_UP_TO in all.
    """
    random = np.random.RandomState(lesson.run.config.training.seed)
    chosen = np.sort(random.permutation(len(lesson.images))[:VIEWS_UP_TO])
    (items,) = lesson.images.batches([chosen])
    more, views = min(VIEWS, max(0, VIEWS_UP_TO // len(items) - 1)), lesson.run.preprocessing.views
    shown = np.concatenate([items, *(views(items, random) for _ in range(more))])
    return chosen, Decoded(shown, np.zeros(len(shown), np.int64))


def _warn_if_still(lesson: Lesson, model: SDLoRA) -> None:
    """Warn if the new direction changes next to nothing.

    The first step moves the head alone, which starts at zero.
    """
    if not (model.rank and distributed.first()):
        return
    run = lesson.run
    moved = float((model.norm() * model.coefficients()[-1].detach().abs()).max())
    rows = [run.base_weights[p.tensor][p.start : p.stop] for p in model.projections]
    squares = sum(float(np.square(weight, dtype=np.float64).sum()) for weight in rows)
    size = math.sqrt(squares / len(rows))
    if moved <= NEGLIGIBLE * size:
        log.warning(
            "task %d: after %d step(s) its direction changes the weights by %.1g of their norm, "
            "which is next to nothing: begin a run with more --epochs, a smaller --batch-size or "
            "another --lr",
            lesson.number,
            math.prod(steps_of(run.config, len(lesson.taught), lesson.number)),
            moved / max(size, 1e-12),
        )


def _require_bounded(update: TaskUpdate, settings: Settings) -> None:
    """Raises DivergedError for numbers that no device takes."""
    head = update.head
    numbers = [update.deltas, head.new_weight, head.new_bias, head.step, head.bias]
    numbers += [array for f in update.factors.values() for array in (f.A, f.B)]
    largest = max(float(np.abs(array.astype(np.float64)).max(initial=0.0)) for array in numbers)
    if not largest <= LIMITS.magnitude:
        what = f"it learned {largest:g}, and {LIMITS.magnitude:g} is the largest number"
        raise diverged(f"task {update.task}", what, settings)


def _absorb(run: Run, model: SDLoRA) -> dict[str, Any]:
    """KD: give the finished direction to the old magnitudes, if old directions reproduce it."""
    old = run.past.factors
    if not (run.config.method.absorb and model.rank and any(old)):
        return {}
    directions = [*old, model.directions(run.config.method.encoding)]
    shares, residual = absorb.fit(directions, _numpy(model.magnitudes).astype(np.float64))
    if absorbed := residual <= run.config.method.absorb:
        model.absorb(shares)
    return {"residual": residual, "absorbed": absorbed}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

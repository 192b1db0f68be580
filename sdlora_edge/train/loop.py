"""The loop over tasks: learn, finish, ship-round, score, record. A killed run goes on at the task and epoch it was in."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, SdloraError
from ..formats.canonical import tensors_digest
from ..formats.container import LIMITS
from ..formats.encoding import Factors, encode
from ..inputs.image import Preprocessing
from ..method import absorb, backbones
from ..method.head import FeatureStatistics
from ..method.sdlora import SDLoRA, features
from ..state import TaskUpdate, advance, changed_rows, factor_tensors
from . import distributed, folder, inventory, plan, splits
from .augment import views
from .base import train_base
from .fit import PARTIAL, Checkpoint, diverged, fit, writer
from .folder import locked
from .run import Run, point_latest
from .score import Scorer, seen_features, slices
from .settings import Settings
from .source import Source
from .splits import Decoded, Images, Part

log = logging.getLogger("sdlora_edge")
Report = Callable[[Run], None]
"""called after every task that was recorded"""
Direction = tuple[Mapping[str, Factors], np.ndarray]
"""one that was learned elsewhere: its factors as they are shipped, and the magnitude deltas of `TaskUpdate`"""
NEGLIGIBLE = 1e-4
"""a direction's share of the weights' norm; those of real tasks were 0.005 to 0.02"""
VIEWS, VIEWS_UP_TO = 3, 2000
"""random views of each new image by which the drift is measured, and the most images that is done with"""


def train(
    settings: Settings,
    out: Path | None = None,
    report: Report = lambda run: None,
    source: Source | None = None,
) -> Run:
    """Train all tasks of a new run in the folder `out` (default: runs/<time>), and point runs/latest to it.

    source: what `check.new_run` has returned, if it was called. Raises UsageError, InputError before anything is written where
    settings or images do not make sense.
    """
    distributed.begin(backbones.resolve_device(settings.training.device))
    source = source or plan.new_run(settings, out)
    source = _looked_at(source, settings)
    distributed.wait()  # until no process looks for `out` any more
    backbone, prepared = _backbone(settings)
    backbones.projections(backbone, settings.backbone.targets)
    prepared |= {
        name: value for name in ("mean", "std") if (value := getattr(settings.backbone, name))
    }
    prepare = Preprocessing(**prepared)
    root = str(Path(settings.data.data_root).resolve()) if settings.data.data_root else ""
    settings = settings.changed(
        data=source.name,
        data_root=root,
        image_size=prepare.size,
        mean=prepare.mean,
        std=prepare.std,
    )
    out = out or Path("runs") / distributed.agreed(datetime.now().strftime("%Y%m%d-%H%M%S"))
    if distributed.first():
        Run.begin(out, settings)
        inventory.record(out, source)
    distributed.wait()
    with _only_writer(out):
        try:
            return _resume(out, report, source)
        except SdloraError:
            if (
                distributed.first() and not Run.is_begun(out) and not (out / PARTIAL).exists()
            ):  # nothing was learned
                shutil.rmtree(out)
            raise


def resume(
    path: Path, report: Report = lambda run: None, asked: Source | plan.NewTask | None = None
) -> Run:
    """Go on with a run that was killed: at the task and epoch it was in, also of a task that was being added to it.

    asked: what `check.resumed` has returned, if it was called. Returns at once if nothing is left to do. Raises UsageError if
    another process is training it.
    """
    settings = Run.settings(path)
    distributed.begin(backbones.resolve_device(settings.training.device))
    asked = asked or plan.resumed(path)
    if isinstance(asked, plan.NewTask):
        return learn(asked, report)
    source = _looked_at(asked, settings)
    with _only_writer(path):
        return _resume(path, report, source)


def _resume(path: Path, report: Report, source: Source) -> Run:
    settings = Run.settings(path)
    parts, begun = splits.parts(source, settings), Run.is_begun(path)
    distributed.wait()
    with _interruptible(f"train --run {path}"):
        if not begun:
            _prepare(path, settings, parts[0])
        run = Run.open(path)
        scorer = Scorer(run, {source.name: source})
        if settings.data.base_classes and not run.metrics and distributed.first():
            run.record(
                scorer.entry(
                    replace(parts[0], name="base"),
                    int(run.frozen.counts.sum()),
                    run.base_seconds,
                    {},
                )
            )
            report(run)
        parts = parts[bool(settings.data.base_classes) :]
        for entry, part in zip((e for e in run.metrics if e["task"]), parts, strict=False):
            if entry["classes"] != list(part.classes):
                raise InputError(
                    f"{source.name} has changed since task {entry['task']} was learned: put its classes back"
                )
        for part in parts[len(run.updates) :]:
            _train_task(run, part, scorer)
            report(run)
    return run


def add_task(
    path: Path,
    images: str,
    name: str | None = None,
    report: Report = lambda run: None,
    direction: Direction | None = None,
    command: str = "train",
) -> Run:
    """Learn ONE more task from a new folder or ZIP, with nothing but its images: new classes, known ones in a new domain, or both.

    With a `direction` that was learned elsewhere, only the head is learned; `command` is what the user called, for messages. A class
    that comes alone gets a head row, and no direction (`FeatureStatistics.beside`).
    Earlier tasks are scored again where their own test images can still be read, and left out where they cannot.
    """
    return learn(plan.one_more(path, images, name), report, direction, command)


def learn(
    task: plan.NewTask,
    report: Report = lambda run: None,
    direction: Direction | None = None,
    command: str = "train",
) -> Run:
    """`add_task`, of a task that was checked."""
    settings = Run.settings(task.run)
    settings = settings if task.strict is None else settings.changed(strict=task.strict)
    distributed.begin(backbones.resolve_device(settings.training.device))

    if task.source is None or task.changes:
        raise NotImplementedError("tasks that change known classes")

    def cut(source: Source) -> list[Part]:
        return [
            part for part in (splits.part(source, task.name, source.classes, (), settings),) if part
        ]

    source, (part,) = inventory.checked(task.source, cut, settings)
    with _only_writer(task.run):
        if distributed.first():
            inventory.record(task.run, source)
        run = Run.open(task.run)
        kept: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        goes_on = f"{command} --run {task.run} --data {task.images} --name {shlex.quote(task.name)}"
        if direction is None:  # else only its own command can go on with it
            kept = (
                folder.adding(task.run, task.source.name, task.name, task.strict)
                if distributed.first()
                else kept
            )
            goes_on = f"train --run {task.run}"
        with kept, _interruptible(goes_on):
            _train_task(run, part, Scorer(run, {source.name: source}), direction)
    report(run)
    return run


def _only_writer(path: Path) -> contextlib.AbstractContextManager[None]:
    """torchrun's processes are one writer: the first holds the lock for all."""
    return locked(path) if distributed.first() else contextlib.nullcontext()


@contextlib.contextmanager
def _interruptible(arguments: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        log.warning(
            "stopped; what was learned up to the last whole epoch is kept: go on with sdlora-edge %s",
            arguments,
        )
        raise


def _looked_at(source: Source, settings: Settings) -> Source:
    """What a run learns from, once every image was looked at."""
    return inventory.checked(source, lambda s: splits.parts(s, settings), settings)[0]


def _backbone(settings: Settings) -> tuple[torch.nn.Module, dict[str, Any]]:
    _seed(settings.training.seed, 0)
    weights = Path(settings.backbone.weights) if settings.backbone.weights else None
    pretrained = not settings.data.base_classes and settings.backbone.backbone != backbones.MICRO
    return backbones.create(
        settings.backbone.backbone, settings.backbone.image_size or None, weights, pretrained
    )


def _prepare(path: Path, settings: Settings, base_part: Part) -> None:
    """The state before the first task: the backbone, after its base session if it has one."""
    begin = time.perf_counter()
    device = distributed.begin(backbones.resolve_device(settings.training.device))
    backbone, prepared = _backbone(settings)
    prepare = Preprocessing(
        **prepared | {"mean": settings.backbone.mean, "std": settings.backbone.std}
    )
    statistics = FeatureStatistics.empty(backbones.features(backbone))
    if not settings.data.base_classes:
        width = backbones.features(backbone)
        nothing = ("backbone", (), np.zeros((0, width), np.float32), np.zeros(0, np.float32))
        if distributed.first():
            Run.create(path, settings, backbone, prepare, nothing, statistics, nothing[2:])
            point_latest(path)
        distributed.wait()
        return
    classes = base_part.classes
    images = splits.decode(base_part.train, classes, prepare, need=True)
    checkpoint = Checkpoint(path, "base", base_part.source, classes, len(images), settings)
    linear = train_base(backbone.to(device), images, prepare, len(classes), settings, checkpoint)
    if distributed.first():
        shown = (prepare.normalise(pixels) for pixels in images.batches(slices(len(images))))
        seen = np.concatenate([features(backbone, {}, batch) for batch in shown])
        statistics = statistics.with_images(seen, images.targets, len(classes))
        plain = _numpy(linear.weight), _numpy(linear.bias)
        head = statistics.discriminant() if settings.method.head == "aligned" else plain
        base = ("base", classes, head[0].astype(np.float16).astype(np.float32), head[1])
        Run.create(
            path,
            settings,
            backbone.cpu(),
            prepare,
            base,
            statistics,
            plain,
            time.perf_counter() - begin,
        )
        point_latest(path)
    distributed.wait()


def _train_task(run: Run, part: Part, scorer: Scorer, direction: Direction | None = None) -> None:
    """Learn one task and record it. The head's rows of known classes are trained on, where the task has such classes."""
    settings, begin = run.config, time.perf_counter()
    device = distributed.begin(backbones.resolve_device(settings.training.device))
    images = splits.read(part.train, part.classes, run.preprocessing, settings.training.cache_gb)
    number, state = len(run.states), run.states[-1]
    new = tuple(c for c in part.classes if c not in state.classes)
    classes = state.classes + new
    rows = np.array([classes.index(c) for c in part.classes])
    weight = np.concatenate([run.plain[0], np.zeros((len(new), run.plain[0].shape[1]), np.float32)])
    bias = np.concatenate([run.plain[1], np.zeros(len(new), np.float32)])
    _seed(settings.training.seed, number)
    run.backbone.to(device)
    head = weight[rows], bias[rows]
    alone = len(part.classes) == 1 and run.statistics is not None and direction is None
    if alone:
        direction = _nothing(run)
    exact = direction[0] if direction else None
    direction = (
        (
            {name: encode(f, settings.method.encoding) for name, f in direction[0].items()},
            direction[1],
        )
        if direction
        else None
    )
    model = (_holding(run, *direction, head) if direction else _learning(run, head)).to(device)
    prepare, old_weights = run.preprocessing, run.weights(state.task)
    key = [tensors_digest(factor_tensors(direction[0]))] if direction else []
    checkpoint = Checkpoint(
        run.path,
        number,
        part.source,
        part.name,
        part.classes,
        len(images),
        state.digest,
        settings,
        *key,
    )
    if not alone:  # which has no other class of its task to be told from
        fit(model, images, settings, prepare, number, checkpoint, writer(run.path, settings))
        _warn_if_still(run, model, number, len(images))
        model.finish_task()
    if distributed.first():
        facts, targets = _absorb(run, model), rows[images.targets]
        directions, deltas = direction or _direction(model, number, settings)
        run.exact = exact or model.directions("fp32")
        facts["rank"] = max((f.A.shape[0] for f in directions.values()), default=0)
        frozen = seen_features(run, {}, images)
        run.frozen = run.frozen.with_images(frozen, targets, len(classes))
        weight[rows], bias[rows] = _numpy(model.head.weight), _numpy(model.head.bias)
        run.plain = weight, bias
        if alone and run.statistics is not None:
            run.statistics = run.statistics.with_images(
                seen_features(run, old_weights, images), targets, len(classes)
            )
            weight, bias = run.statistics.beside(state.head_weight, state.head_bias, rows)
        elif run.statistics is not None:
            new_weights = run.weights_with(directions, deltas)
            run.statistics = _aligned(
                run, run.statistics, old_weights, new_weights, images, targets, len(classes)
            )
            weight, bias = run.statistics.discriminant()
        update = TaskUpdate(
            number, part.name, new, deltas, changed_rows(state, weight, bias), directions
        )
        _require_bounded(update, settings)
        run.follow(update)
        seconds = time.perf_counter() - begin
        run.record(
            scorer.entry(
                part, len(images), seconds, facts | {"packet_bytes": run.packet_bytes(number)}
            )
        )
        checkpoint.clear()
        _log_scores(run)
    distributed.wait()
    if not distributed.first():
        run.reopen()


def _learning(run: Run, head: tuple[np.ndarray, np.ndarray]) -> SDLoRA:
    """The model that learns the next task. head: its rows to start from, float32 (classes, features), (classes,)."""
    settings, number = run.config, len(run.states)
    return SDLoRA(
        run.backbone,
        run.projections,
        run.states,
        len(head[0]),
        settings.method.rank_of(number) if settings.method.method != "frozen" else 0,
        "none" if settings.method.method == "lora" else settings.method.magnitudes,
        settings.method.magnitude_init,
        magnitude_norm=settings.method.magnitude_norm,
        directions="continue" if settings.method.method == "lora" else settings.method.directions,
        head=head,
    )


def _nothing(run: Run) -> Direction:
    """The direction of rank 0, of a class that is learned alone."""
    wide = run.config.method.magnitude_norm == "factors"
    return {}, np.zeros((len(run.states), len(run.projections)) if wide else len(run.states))


def _holding(
    run: Run,
    factors: Mapping[str, Factors],
    deltas: np.ndarray,
    head: tuple[np.ndarray, np.ndarray],
) -> SDLoRA:
    """The model that has the next task's direction already, as one more old one, and learns nothing but its head."""
    before = run.states[-1]
    known = TaskUpdate(
        before.task + 1,
        "",
        (),
        deltas,
        changed_rows(before, before.head_weight, before.head_bias),
        factors,
    )
    scope = "projection" if deltas.ndim == 2 else "shared"
    states = [*run.states, advance(before, known)]
    return SDLoRA(
        run.backbone,
        run.projections,
        states,
        len(head[0]),
        0,
        "none",
        magnitude_scope=scope,
        head=head,
    )


def _aligned(
    run: Run,
    statistics: FeatureStatistics,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    images: Images,
    targets: np.ndarray,
    classes: int,
) -> FeatureStatistics:
    """The statistics of all classes under the weights after a task: old ones follow the drift, the new images' are added."""
    if len(statistics.means):
        shown = _views(images, run.config.training.seed)
        statistics = statistics.drifted(
            *(seen_features(run, weights, shown) for weights in (before, after))
        )
    return statistics.with_images(seen_features(run, after, images), targets, classes)


def _views(images: Images, seed: int) -> Decoded:
    """The new images and random views of them, VIEWS_UP_TO at the most: what the drift is measured on."""
    random = np.random.RandomState(seed)
    (pixels,) = images.batches([np.sort(random.permutation(len(images))[:VIEWS_UP_TO])])
    more = min(VIEWS, max(0, VIEWS_UP_TO // len(pixels) - 1))
    shown = np.concatenate([pixels, *(views(pixels, random) for _ in range(more))])
    return Decoded(shown, np.zeros(len(shown), np.int64))


def _warn_if_still(run: Run, model: SDLoRA, task: int, images: int) -> None:
    """Say so if the new direction changes next to nothing: the first step moves the head alone, which starts at zero."""
    if not (model.rank and distributed.first()):
        return
    moved = float((model.norm() * model.coefficients()[-1].detach().abs()).max())
    rows = [run.base_weights[p.tensor][p.start : p.stop] for p in model.projections]
    size = math.sqrt(
        sum(float(np.square(weight, dtype=np.float64).sum()) for weight in rows) / len(rows)
    )
    if moved <= NEGLIGIBLE * size:
        steps = run.config.training.epochs * math.ceil(images / run.config.training.batch_size)
        log.warning(
            "task %d: after %d step(s) its direction changes the weights by %.1g of their norm, which is next to nothing: begin a run "
            "with more --epochs, a smaller --batch-size or another --lr",
            task,
            steps,
            moved / max(size, 1e-12),
        )


def _direction(model: SDLoRA, task: int, settings: Settings) -> Direction:
    try:
        return model.directions(settings.method.encoding), model.deltas()
    except ValueError as error:
        raise diverged(f"task {task}", str(error), settings) from error


def _require_bounded(update: TaskUpdate, settings: Settings) -> None:
    """Raises DivergedError for numbers that no device would take."""
    head = update.head
    numbers = [update.deltas, head.new_weight, head.new_bias, head.scale, head.bias]
    numbers += [array for f in update.factors.values() for array in (f.A, f.B)]
    largest = max(float(np.abs(array.astype(np.float64)).max(initial=0.0)) for array in numbers)
    if not largest <= LIMITS.magnitude:
        raise diverged(
            f"task {update.task}",
            f"it learned {largest:g}, and {LIMITS.magnitude:g} is the largest number",
            settings,
        )


def _absorb(run: Run, model: SDLoRA) -> dict[str, Any]:
    """KD: give the finished direction to the old ones' magnitudes where they can express it."""
    old = run.factors(len(run.updates))
    if not (run.config.method.absorb and model.rank and any(old)):
        return {}
    shares, residual = absorb.fit(model.directions(run.config.method.encoding), old)
    if absorbed := residual <= run.config.method.absorb:
        model.absorb(shares)
    return {"residual": residual, "absorbed": absorbed}


def _log_scores(run: Run) -> None:
    note, entry = writer(run.path, run.config), run.metrics[-1]
    if "accuracy" in entry:
        note("accuracy/all", entry["accuracy"][-1], entry["task"])


def _seed(seed: int, task: int) -> None:
    torch.manual_seed(seed * 1009 + task)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

"""The loop over tasks: learn, score, write.

A run that was killed goes on at the task and epoch it was in.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, SdloraError
from ..inputs.modality import Preparation, kind_of
from ..method import backbones, features
from ..method.calibration import Calibration
from ..method.feature_spec import FeatureSpec
from ..method.head import FeatureStatistics
from ..method.merged import Merged
from ..method.sdlora import zero_head
from ..state import TaskUpdate, changed_rows
from . import distributed, folder, inventory, plan, splits
from .base import train_base
from .evaluator import slices
from .fit import PARTIAL, Checkpoint, writer
from .folder import Pending, locked, point_latest
from .kinds import Upload, Wanted, modality
from .lesson import Lesson, held_out
from .plan import ClassChanges
from .run import Base, Run
from .score import Learned, Scorer
from .settings import Settings
from .shipped import before_all, blank_images, judge_without, step_for, with_confidence
from .source import Source
from .splits import Images, Part
from .task import Direction, change_classes, learn_task
from .tasks import Kept

log = logging.getLogger("sdlora_edge")
Report = Callable[[Run], None]
"""called after every task that was written"""


def _no_report(run: Run) -> None:
    pass


def train(
    settings: Settings,
    out: Path | str | None = None,
    report: Report = _no_report,
    source: Source | None = None,
) -> Run:
    """Train all tasks of a new run, and point runs/latest to it.

    Args:
        settings: Of the run. They are checked with the images before anything is written.
        out: Folder of the run. Default: runs/<time>.
        report: Called after every task.
        source: What `plan.new_run` has returned, if it was called.

    Raises:
        UsageError: Settings, images and folder do not go together.
        InputError: An image or a file cannot be read.
    """
    out = None if out is None else Path(out)
    distributed.begin(backbones.resolve_device(settings.training.device))
    source = source or plan.new_run(settings, out)
    source = _checked(source, settings)
    distributed.wait()  # until no process looks for `out` any more
    start = _Start.of(settings)
    backbones.projections(start.backbone, settings.backbone.targets)
    settings = settings.changed(
        data=source.name,
        data_root=str(Path(settings.data.data_root).resolve()) if settings.data.data_root else "",
        features=str(start.features(settings)),
        **start.prepare.settings,
    )
    out = out or Path("runs") / distributed.agreed(datetime.now().strftime("%Y%m%d-%H%M%S"))
    if distributed.first():
        Run.begin(out, settings)
        inventory.record(out, source)
    distributed.wait()
    with _only_writer(out):
        try:
            return _stream(out, report, source, start)
        except SdloraError:
            learned = Run.is_begun(out) or (out / PARTIAL).exists()
            if distributed.first() and not learned:
                shutil.rmtree(out)
            raise


def resume(
    path: Path | str, report: Report = _no_report, asked: Source | plan.NewTask | None = None
) -> Run:
    """Go on with a run that was killed, at the task and epoch it was in.

    It goes on with a task that was being added too. Returns at once if nothing is left to do.

    Args:
        path: The run.
        report: Called after every task.
        asked: What `plan.resumed` has returned, if it was called.

    Raises:
        UsageError: Another process is training the run.
    """
    path = Path(path)
    settings = Run.settings(path)
    distributed.begin(backbones.resolve_device(settings.training.device))
    asked = asked or plan.resumed(path)
    if isinstance(asked, plan.NewTask):
        return learn(asked, report)
    source = _checked(asked, settings)
    with _only_writer(path):
        return _stream(path, report, source)


def add_task(
    path: Path | str,
    images: Path | str | None = None,
    name: str | None = None,
    changes: ClassChanges = ClassChanges(),
    report: Report = _no_report,
) -> Run:
    """Learn ONE more task: from new images, by changes of known classes, or both.

    The images may show new classes, known ones in a new domain, or both. A class that comes alone
    gets a head row and no direction. Earlier tasks are scored again if their own test images can
    still be read, and left out if they cannot.

    Args:
        path: The run.
        images: A folder or ZIP with a folder for each class.
        name: The task's name. Default: the name of the folder.
        changes: Classes to retire and rename. A retired class is never answered again; its name may
            come back as a new class.
        report: Called when the task is written.

    Raises:
        UsageError: The run does not take the images or the changes.
        InputError: The folder is not a run, or the images cannot be read.
    """
    asked = None if images is None else str(images)
    return learn(plan.one_more(Path(path), asked, name, changes), report)


def learn(
    task: plan.NewTask,
    report: Report = _no_report,
    direction: Direction | None = None,
    command: str = "train",
) -> Run:
    """`add_task`, for a task that was checked.

    direction: one that was learned elsewhere; then the head alone is trained. command: what the
    user called, for messages.
    """
    settings = Run.settings(task.run)
    settings = settings if task.strict is None else settings.changed(strict=task.strict)
    distributed.begin(backbones.resolve_device(settings.training.device))
    source, part = _checked_task(task, settings)
    with _only_writer(task.run):
        if source and distributed.first():
            inventory.record(task.run, source)
        run = Run.open(task.run)
        scorer = Scorer(run, {source.name: source} if source else {})
        if direction is None:
            goes_on = f"train --run {task.run}"
            kept = _pending(task)
        else:  # only the same command can go on
            data = f"--data {task.images} --name {shlex.quote(task.name)}"
            goes_on, kept = f"{command} --run {task.run} {data}", contextlib.nullcontext()
        with kept, _interruptible(goes_on):
            _learn(part, scorer, task.changes, direction)
    report(run)
    return run


def _checked_task(task: plan.NewTask, settings: Settings) -> tuple[Source | None, Part]:
    """(a task's images, what it learns), after every image was looked at."""
    if task.source is None:
        return None, Part(task.name, (), {}, {}, "")

    def cut(source: Source) -> list[Part]:
        part = splits.part(source, task.name, source.classes, (), settings)
        return [part] if part else []

    source, (part,) = inventory.checked(task.source, cut, settings)
    return source, part


def _pending(task: plan.NewTask) -> contextlib.AbstractContextManager[None]:
    """Note the task in the run while it is learned, so that `train --run RUN` can go on with it."""
    if not distributed.first():
        return contextlib.nullcontext()
    images = task.source.name if task.source else ""
    asked = Pending(images, task.name, task.strict, task.changes.retired, task.changes.renamed)
    return folder.adding(task.run, asked)


@dataclass(frozen=True, eq=False)
class _Start:
    """What a run starts from: its backbone, and how it wants images.

    random: the random state after the backbone's initialisation, with which the base session
    begins.
    """

    backbone: torch.nn.Module
    prepare: Preparation
    random: torch.Tensor

    @classmethod
    def of(cls, settings: Settings) -> _Start:
        torch.manual_seed(settings.training.seed * 1009)
        asked = settings.backbone
        wanted = Wanted(
            asked.backbone,
            asked.image_size,
            asked.max_tokens,
            Path(asked.weights) if asked.weights else None,
            not settings.data.base_classes and asked.backbone != backbones.MICRO,
            {name: own for name in ("mean", "std") if (own := getattr(asked, name))},
        )
        backbone, prepare = modality(kind_of(asked.backbone)).create(wanted)
        assert prepare is not None
        return cls(backbone, prepare, torch.get_rng_state())

    def features(self, settings: Settings) -> FeatureSpec:
        """What the head sees. Raises UsageError if the backbone does not have it."""
        asked = settings.method
        example = self.prepare.canary(0, 1)
        return features.resolve(self.backbone, asked.features, example, asked.head)


def _stream(path: Path, report: Report, source: Source, start: _Start | None = None) -> Run:
    """Learn the tasks of a run that are left.

    start: of a run that has no backbone yet, if it is at hand.
    """
    settings = Run.settings(path)
    parts, begun = splits.parts(source, settings), Run.is_begun(path)
    distributed.wait()
    with _interruptible(f"train --run {path}"):
        run = Run.open(path) if begun else _begin(path, start or _Start.of(settings), parts[0])
        scorer = Scorer(run, {source.name: source})
        if settings.data.base_classes and not run.metrics and distributed.first():
            images = int(run.kept.frozen.counts.sum())
            facts = {"training_images": images, "seconds": round(run.base_seconds, 2)}
            run.score_base(scorer.entry(replace(parts[0], name="base"), Learned.of(run), facts))
            report(run)
        parts = parts[bool(settings.data.base_classes) :]
        _require_unchanged(run, source, parts)
        if len(run.updates) >= len(parts):
            log.info("nothing is left to do: %s has learned its tasks", path)
        for part in parts[len(run.updates) :]:
            _learn(part, scorer)
            report(run)
    return run


def _require_unchanged(run: Run, source: Source, parts: Sequence[Part]) -> None:
    """Raise InputError if the source would be cut into other tasks than those that were learned."""
    learned = (entry for entry in run.metrics if entry["task"])
    for entry, part in zip(learned, parts, strict=False):
        if entry["classes"] != list(part.classes):
            raise InputError(
                f"{source.name} has changed since task {entry['task']} was learned: "
                "put its classes back"
            )


def _only_writer(path: Path) -> contextlib.AbstractContextManager[None]:
    """torchrun's processes are one writer: the first holds the lock for all."""
    return locked(path) if distributed.first() else contextlib.nullcontext()


@contextlib.contextmanager
def _interruptible(arguments: str) -> Iterator[None]:
    """If the user stops the training, say how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        log.warning(
            "stopped; everything up to the last finished epoch is kept: go on with sdlora-edge %s",
            arguments,
        )
        raise


def _checked(source: Source, settings: Settings) -> Source:
    """What a run learns from, after every image was looked at."""
    return inventory.checked(source, lambda s: splits.parts(s, settings), settings)[0]


def _begin(path: Path, start: _Start, base_part: Part) -> Run:
    """Write the state before the first task: the backbone, after its base session if it has one."""
    settings = Run.settings(path)
    torch.set_rng_state(start.random)
    if settings.data.base_classes:
        base = _base_session(path, start, base_part)
    else:
        width = features.width(start.backbone, FeatureSpec.parse(settings.method.features))
        nothing, plain = FeatureStatistics.empty(width), backbones.features(start.backbone)
        aligned = nothing if settings.method.head == "aligned" else None
        kept = Kept(nothing, zero_head(0, plain), aligned)
        rows = changed_rows(before_all(width), *zero_head(0, width))
        base = Base(TaskUpdate(0, "backbone", (), np.zeros(0), rows, {}), kept)
    if distributed.first():
        run = Run.create(path, settings, start.backbone, start.prepare, base)
        point_latest(path)
    distributed.wait()
    return run if distributed.first() else Run.open(path)


def _base_session(path: Path, start: _Start, part: Part) -> Base:
    """Train the whole backbone on the base classes."""
    settings, begin, prepare = Run.settings(path), time.perf_counter(), start.prepare
    images = splits.decode(part.train, part.classes, prepare, need=True)
    random = np.random.RandomState(settings.training.seed)
    unseen = held_out(images.targets, settings.data.held_out, random)
    taught = images.subset(np.setdiff1d(np.arange(len(images)), unseen))
    checkpoint = Checkpoint(path, "base", part.source, part.classes, len(taught), settings)
    backbone = start.backbone.to(_device(settings))
    linear = train_base(backbone, taught, prepare, settings, checkpoint)
    model = Merged(backbone, {}, spec=FeatureSpec.parse(settings.method.features))
    upload = modality(prepare.kind).upload(prepare, model.device)
    seen, nothing = (_seen(model, upload, shown) for shown in (images, blank_images(prepare)))
    empty, classes = FeatureStatistics.empty(seen.shape[1]), list(range(len(part.classes)))
    rest = np.setdiff1d(np.arange(len(images)), unseen)
    others = empty.with_images(seen[rest], images.targets[rest], len(classes))
    frozen = others.with_images(seen[unseen], images.targets[unseen], len(classes))
    plain = linear.weight.detach().cpu().numpy(), linear.bias.detach().cpu().numpy()
    aligned = frozen if settings.method.head == "aligned" else None
    judge = judge_without(others if aligned else None, plain, classes, nothing)
    calibration = judge.measured(Calibration.empty(), seen[unseen], images.targets[unseen])
    kept = Kept(frozen, plain, aligned, calibration, nothing)
    before = before_all(seen.shape[1])
    head = aligned.discriminant() if aligned else plain
    step = step_for(kept, head, classes, settings.method.head_rank)
    rows = changed_rows(before, *head, step=step)
    update = TaskUpdate(0, "base", part.classes, np.zeros(0), rows, {})
    return Base(with_confidence(before, update, kept), kept, time.perf_counter() - begin)


def _seen(model: Merged, upload: Upload, images: Images) -> np.ndarray:
    """What the head sees of images: float32 (N, features)."""
    batches = map(upload, images.batches(slices(len(images))))
    return np.concatenate([model.features(*batch) for batch in batches])


def _learn(
    part: Part,
    scorer: Scorer,
    changes: ClassChanges = ClassChanges(),
    direction: Direction | None = None,
) -> None:
    """Learn one task, score it and write it."""
    run, begin = scorer.run, time.perf_counter()
    run.backbone.to(_device(run.config))
    lesson = Lesson.of(run, part, changes)
    if part.classes:
        result = learn_task(lesson, direction)
    else:
        result = change_classes(lesson) if distributed.first() else None
    if result is not None:
        facts = {
            "training_images": len(lesson.images),
            "seconds": round(time.perf_counter() - begin, 2),
            "retired": list(changes.retired),
            "renamed": dict(changes.renamed),
            **(result.metrics or {}),
            "packet_bytes": run.packet_bytes(result.update),
        }
        entry = scorer.entry(part, Learned.of(run, result), facts)
        run.append(replace(result, metrics=entry))
        Checkpoint(run.path).clear()
        if "accuracy" in entry:
            note = writer(run.path, run.config)
            note("accuracy/all", entry["accuracy"][-1], entry["task"])
    distributed.wait()
    if not distributed.first():
        run.read_new()


def _device(settings: Settings) -> torch.device:
    """The device that this process trains on."""
    return distributed.begin(backbones.resolve_device(settings.training.device))

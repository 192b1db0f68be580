"""The loop over tasks: learn, finish, ship-round, score, record. A killed run goes on at the task it was in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..device.preprocessing import Preprocessing
from ..errors import InputError, UsageError
from ..method import backbones
from ..method.head import FeatureStatistics
from ..method.sdlora import SDLoRA, features, logits
from ..state import TaskState, TaskUpdate, changed_rows, merge
from . import data, metrics
from .base import train_base
from .config import TrainConfig
from .data import Decoded, Picture, Source
from .run import Run, point_latest

log = logging.getLogger("sdlora_edge")
Report = Callable[[Run], None]
"""called after every task that was recorded"""

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def train(settings: TrainConfig, out: Path | None = None, report: Report = lambda run: None) -> Run:
    """Train all tasks of a new run in the folder `out` (default: runs/<time>), and point runs/latest to it.

    Raises UsageError, InputError before anything is written where settings or pictures do not make sense.
    """
    device = backbones.resolve_device(settings.device)
    source = data.load(settings.data, settings.test_fraction, settings.seed)
    stream = data.task_classes(source.classes, settings.base_classes, settings.tasks, settings.seed)
    weights = Path(settings.weights) if settings.weights else None
    _seed(settings.seed, 0)
    pretrained = not settings.base_classes and settings.backbone != backbones.MICRO
    if settings.backbone == backbones.MICRO and not settings.base_classes:
        raise UsageError(
            "micro_vit has no pre-trained weights: give it a base session with base_classes, or choose another backbone"
        )
    backbone, prepared = backbones.create(settings.backbone, settings.image_size or None, weights, pretrained)
    backbones.projections(backbone)
    prepared |= {name: value for name in ("mean", "std") if (value := getattr(settings, name))}
    preprocessing = Preprocessing(**prepared)
    settings = replace(settings, data=source.name, image_size=preprocessing.size, mean=preprocessing.mean, std=preprocessing.std)
    out = out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    if settings.base_classes:
        run = _base_session(out, settings, backbone.to(device), preprocessing, source, stream[0])
        report(run)
    else:
        width = backbones.features(backbone)
        nothing = ("backbone", (), np.zeros((0, width), np.float32), np.zeros(0, np.float32))
        statistics = FeatureStatistics.empty(width) if settings.head == "aligned" else None
        run = Run.create(out, settings, backbone, preprocessing, nothing, statistics)
    point_latest(out)
    return _remaining(run, source, report)


def resume(path: Path, report: Report = lambda run: None) -> Run:
    """Go on with a run that was killed: at the task it was in. Returns at once where nothing is left to do."""
    run = Run.open(path)
    settings = run.config
    return _remaining(run, data.load(settings.data, settings.test_fraction, settings.seed), report)


def add_task(path: Path, folder: str, name: str | None = None, report: Report = lambda run: None) -> Run:
    """Learn ONE more task: the classes of a new folder or ZIP, with nothing but its pictures.

    Earlier tasks are scored again where their own test pictures can still be read, and left out where they cannot.
    Raises UsageError where a class is known already.
    """
    run = Run.open(path)
    if (done := len(run.updates)) < run.config.tasks:
        raise UsageError(f"{path} has finished {done} of its {run.config.tasks} tasks: resume it first with train --run {path}")
    source = data.load(folder, run.config.test_fraction, run.config.seed)
    if len(source.classes) < 2:
        raise UsageError(f"{folder} has one class only ({source.classes[0]}): at least two are needed to learn a difference")
    if known := set(source.classes) & set(run.states[-1].classes):
        raise UsageError(
            f"{folder}: this run knows the class {', '.join(sorted(known)[:5])} already: a new task brings new classes"
        )
    name = name or Path(folder).stem or "task"
    _train_task(run, source, name, source.classes)
    report(run)
    return run


def _remaining(run: Run, source: Source, report: Report) -> Run:
    settings = run.config
    stream = data.task_classes(source.classes, settings.base_classes, settings.tasks, settings.seed)
    stream = stream[1:] if settings.base_classes else stream
    for number in range(len(run.updates) + 1, settings.tasks + 1):
        _train_task(run, source, f"task {number}", stream[number - 1])
        report(run)
    return run


def _train_task(run: Run, source: Source, name: str, classes: Sequence[str]) -> None:
    settings, begin = run.config, time.perf_counter()
    device = backbones.resolve_device(settings.device)
    pictures = data.decode(source.train, classes, run.preprocessing, need=True)
    number = len(run.states)
    _seed(settings.seed, number)
    model = SDLoRA(
        run.backbone.to(device),
        run.projections,
        run.states,
        len(classes),
        settings.rank_of(number),
        settings.magnitudes,
        settings.magnitude_init,
    ).to(device)
    _fit(model, pictures, settings, run.preprocessing, settings.epochs, f"task {number}")
    model.finish_task()
    state = run.states[-1]
    head = (
        np.concatenate([state.head_weight, _numpy(model.head.weight)]),
        np.concatenate([state.head_bias, _numpy(model.head.bias)]),
    )
    if run.statistics is not None:
        factors = [*run.factors(state.task), model.directions()]
        after = merge(run.base_weights, run.projections, factors, np.append(state.magnitudes, 0.0) + model.deltas())
        old, new = (_features(run.backbone, w, pictures, run.preprocessing) for w in (run.weights(state.task), after))
        run.statistics = run.statistics.drifted(old, new).with_classes(new, pictures.targets, len(classes))
        head = run.statistics.discriminant()
    run.follow(TaskUpdate(number, name, tuple(classes), model.deltas(), *changed_rows(state, *head), model.directions()))
    trained = time.perf_counter() - begin
    rows, totals = _score(run, source, classes)
    run.record(_record(number, name, classes, source, rows, totals, len(pictures), trained))


def _features(backbone: nn.Module, weights: dict[str, np.ndarray], pictures: Decoded, prepare: Preprocessing) -> np.ndarray:
    return np.concatenate([features(backbone, weights, batch) for batch in batches(pictures.pixels, prepare)])


def _fit(model: SDLoRA, pictures: Decoded, settings: TrainConfig, prepare: Preprocessing, epochs: int, title: str) -> None:
    """Minimise the cross-entropy over the task's own classes. The backbone stays in eval mode: it is frozen."""
    device = next(model.parameters()).device
    head = {id(p) for p in model.head.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in head]},
        {"params": list(model.head.parameters()), "lr": settings.lr * settings.head_lr_factor},
    ]
    optimizer = _OPTIMIZERS[settings.optimizer](groups, lr=settings.lr)
    order = torch.Generator().manual_seed(settings.seed)
    with tqdm(total=epochs * len(pictures), desc=title, unit="picture", disable=None) as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(pictures), generator=order).split(settings.batch_size):
                inputs = torch.from_numpy(prepare.normalise(pictures.pixels[batch.numpy()])).to(device)
                targets = torch.from_numpy(pictures.targets)[batch].to(device)
                loss = nn.functional.cross_entropy(model(inputs), targets)
                if not torch.isfinite(loss):
                    raise InputError(f"{title}: the loss is no longer finite; train again with a smaller --lr than {settings.lr:g}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update(len(batch))
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _base_session(
    out: Path, settings: TrainConfig, backbone: nn.Module, prepare: Preprocessing, source: Source, classes: Sequence[str]
) -> Run:
    """A run that begins with plain training of the whole backbone on the base classes, after which it is frozen."""
    begin = time.perf_counter()
    pictures = data.decode(source.train, classes, prepare, need=True)
    inputs = prepare.normalise(pictures.pixels)
    linear = train_base(backbone, pictures, inputs, len(classes), settings.base_epochs, settings.batch_size)
    weight, bias, statistics = _numpy(linear.weight), _numpy(linear.bias), None
    if settings.head == "aligned":
        seen = _features(backbone, {}, pictures, prepare)
        statistics = FeatureStatistics.empty(seen.shape[1]).with_classes(seen, pictures.targets, len(classes))
        weight, bias = statistics.discriminant()
    weight = weight.astype(np.float16).astype(np.float32)
    test = data.decode({c: source.test[c] for c in classes}, classes, prepare, need=False)
    state = TaskState(0, "base", "", tuple(classes), np.zeros(0), weight, bias, {})
    row: list[list[int | None]] = [[_correct(backbone, {}, state, test, classes, prepare)]]
    entry = _record(0, "base", classes, source, row, [len(test)], len(pictures), time.perf_counter() - begin)
    return Run.create(out, settings, backbone.cpu(), prepare, ("base", tuple(classes), weight, bias), statistics, entry)


def _score(run: Run, source: Source, classes: Sequence[str]) -> tuple[list[list[int | None]], list[int]]:
    """The matrix of right answers with the newest task's row added, and the number of test pictures of each task."""
    state, weights = run.states[-1], run.weights(len(run.updates))
    tests = [*test_pictures(run, state.task - 1, source).values(), {c: source.test[c] for c in classes}]
    row: list[int | None] = []
    totals = [entry["totals"][-1] for entry in run.metrics]
    for pictures in tests:
        if pictures is None:
            row.append(None)
            continue
        test = data.decode(pictures, list(pictures), run.preprocessing, need=False)
        row.append(_correct(run.backbone, weights, state, test, list(pictures), run.preprocessing))
    return [*(entry["correct"][-1] for entry in run.metrics), row], [*totals, len(test)]


def test_pictures(run: Run, task: int, *sources: Source) -> dict[int, dict[str, Sequence[Picture]] | None]:
    """By task up to `task`: the test pictures of each of its classes, or None where they can no longer be read.

    sources: already open; the others are opened where the run says they lie.
    """
    opened: dict[str, Source | None] = {source.name: source for source in sources}
    found: dict[int, dict[str, Sequence[Picture]] | None] = {}
    for entry in run.metrics[: task + 1]:
        if entry["task"] > task:
            break
        if (name := entry["source"]) not in opened:
            try:
                opened[name] = data.load(name, run.config.test_fraction, run.config.seed)
            except InputError as error:
                log.warning("the pictures of task %d cannot be read: %s", entry["task"], error)
                opened[name] = None
        source = opened[name]
        whole = source is not None and set(entry["classes"]) <= set(source.test)
        found[entry["task"]] = {c: source.test[c] for c in entry["classes"]} if source is not None and whole else None
    return found


def _correct(
    backbone: nn.Module,
    weights: dict[str, np.ndarray],
    state: TaskState,
    test: Decoded,
    classes: Sequence[str],
    prepare: Preprocessing,
) -> int:
    """How many test pictures get the right class out of ALL classes of the state; targets index `classes`."""
    index = np.array([state.classes.index(c) for c in classes])
    found = [logits(backbone, weights, state, batch).argmax(axis=1) for batch in batches(test.pixels, prepare)]
    return int((np.concatenate([np.zeros(0, np.int64), *found]) == index[test.targets]).sum())


def batches(pixels: np.ndarray, prepare: Preprocessing, size: int = 128) -> Iterator[np.ndarray]:
    """uint8 (N, H, W, 3) as model inputs, a batch at a time."""
    for start in range(0, len(pixels), size):
        yield prepare.normalise(pixels[start : start + size])


def _record(
    task: int,
    name: str,
    classes: Sequence[str],
    source: Source,
    correct: list[list[int | None]],
    totals: list[int],
    pictures: int,
    seconds: float,
) -> dict[str, Any]:
    whole = all(c is not None for row in correct for c in row) and all(totals)
    return {
        "task": task,
        "name": name,
        "classes": list(classes),
        "source": source.name,
        "training_pictures": pictures,
        "seconds": round(seconds, 2),
        "correct": correct,
        "totals": totals,
        **(metrics.summary(correct, totals) if whole else {}),  # type: ignore[arg-type]
    }


def _seed(seed: int, task: int) -> None:
    torch.manual_seed(seed * 1009 + task)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

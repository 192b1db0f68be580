"""One new class at a time: a run learns most classes in a few tasks, then 20 more, each alone, in several ways.

    row          what `train --run` does: rank 0, the new class's head row alone (`FeatureStatistics.beside`)
    all rows     rank 0, all rows fitted again
    direction    a direction of rank 10, trained by a cross-entropy over all classes: old head rows are frozen, and samples of the old
                 classes' Gaussians stand for their images. Then old statistics follow the drift, and all rows are fitted again
    together     the 20 classes as one task, for comparison

Writes docs/figures/one_class.json. Everything is kept in build/one_class/, so a measurement that was stopped goes on.
SDLORA_EDGE_DATA says where images and weights lie. Takes about 20 minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import figures
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from sdlora_edge.method.merged import logits_of
from sdlora_edge.state import TaskUpdate, changed_rows
from sdlora_edge.train import loop, splits, task
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.fit import _optimizer, precision
from sdlora_edge.train.run import Run
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.splits import Part
from sdlora_edge.train.tasks import Kept, TaskResult

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
BUILD = ROOT / "build" / "one_class"
NEW, SEED = 20, 1993
COMMON: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 96,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "test_fraction": 0.3,
    "precision": "bf16",
    "tasks": 4,
}
SETS: dict[str, dict[str, Any]] = {
    "omniglot": {"data": "omniglot_small1.zip", "epochs": 10},
    "caltech101": {"data": "caltech101_128px_max50.zip", "epochs": 5, "train_limit": 24},
}


def folders(name: str) -> tuple[Path, list[Path]]:
    """The images as a user has them: one folder of the base classes, and one for each new class."""
    target = BUILD / name
    with zipfile.ZipFile(SHARED / SETS[name]["data"]) as archive:
        inside = [PurePosixPath(n) for n in archive.namelist() if not n.endswith("/")]
        labels = sorted({".".join(p.parts[1:-1]) for p in inside})
        order = [labels[i] for i in np.random.RandomState(SEED).permutation(len(labels))]
        places = {label: target / "base" / label for label in order[:-NEW]}
        places |= {label: target / f"new-{i:02d}" / label for i, label in enumerate(order[-NEW:])}
        if not target.exists():
            for path in inside:
                file = places[".".join(path.parts[1:-1])] / path.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(str(path)))
    return target / "base", [target / f"new-{i:02d}" for i in range(NEW)]


def base_run(name: str) -> Path:
    path = BUILD / f"{name}-base"
    if path.exists():
        loop.resume(path)
        return path
    weights = str(SHARED / "vit_tiny_patch16_224.fp16.safetensors")
    values = COMMON | SETS[name] | {"data": str(folders(name)[0]), "weights": weights}
    return loop.train(Settings().changed(**values), path).path


def write(run: Run, part: Part, result: TaskResult) -> None:
    """Write a task without a score: the tasks are scored at the end, not after each class."""
    facts = {
        "task": result.update.task,
        "name": part.name,
        "source": part.source,
        "classes": list(part.classes),
        **(result.metrics or {}),
    }
    run.append(replace(result, metrics=facts))


def row(run: Run, part: Part) -> None:
    result = task.learn_task(task.Lesson.of(run, part))
    assert result is not None
    write(run, part, result)


def direction(run: Run, part: Part, steps: int, rate: float = 1.0) -> None:
    learn(run, part, trained(run, part, steps, rate))


def all_rows(run: Run, part: Part) -> None:
    learn(run, part, ({}, task.no_deltas(run)))


def learn(run: Run, part: Part, learned: task.Direction) -> None:
    """What the trainer does with a direction: old statistics follow, all rows are fitted again."""
    lesson, known = task.Lesson.of(run, part), run.kept.aligned
    assert known is not None
    aligned = task._aligned(lesson, known, Evaluator(run, run.weights_with(*learned)))
    seen = Evaluator(run, {}).features(lesson.images)
    frozen = run.kept.frozen.with_images(seen, lesson.targets, len(lesson.classes))
    rows = changed_rows(lesson.before, *aligned.discriminant())
    update = TaskUpdate(lesson.number, part.name, part.classes, learned[1], rows, learned[0])
    write(run, part, TaskResult(update, Kept(frozen, lesson.plain, aligned), learned[0]))


def trained(run: Run, part: Part, steps: int, rate: float) -> task.Direction:
    """The direction of one class: its images against samples of the other classes' Gaussians, which the frozen old rows see."""
    settings, state, known = run.config, run.states[-1], run.kept.aligned
    assert known is not None
    torch.manual_seed(settings.training.seed + state.task)
    random = np.random.RandomState(settings.training.seed + state.task)
    images = splits.decode(part.train, part.classes, run.preprocessing, need=True)
    seen = Evaluator.at(run, state.task).features(images)
    classes = len(state.classes) + 1
    start = known.with_images(seen, np.full(len(seen), classes - 1), classes)
    weight, bias = start.beside(state.head_weight, state.head_bias, np.array([classes - 1]))
    old = torch.from_numpy(weight[:-1]), torch.from_numpy(bias[:-1])
    model = task.new_model(run, (weight[-1:], bias[-1:]))
    root = np.linalg.cholesky(
        known.scatter / (known.counts.sum() - classes + 1) + 1e-6 * np.eye(len(known.scatter))
    )
    optimizer = _optimizer(model, settings.changed(lr=settings.training.lr * rate))
    inputs = torch.from_numpy(run.preprocessing.normalise(images.pixels))
    for _ in range(steps):
        label = random.randint(classes - 1, size=4 * len(inputs))
        sample = known.means[label] + random.randn(len(label), len(root)) @ root.T
        with precision(model.backbone, settings.training.precision, inputs.device):
            own = model.features(inputs)
        shown = torch.cat([own.float(), torch.from_numpy(sample.astype(np.float32))])
        logits = torch.cat([shown @ old[0].T + old[1], model.head(shown)], dim=1)
        target = torch.cat([torch.full((len(inputs),), classes - 1), torch.from_numpy(label)])
        optimizer.zero_grad()
        cross_entropy(logits, target).backward()
        optimizer.step()
    model.finish_task()
    return model.directions(settings.method.encoding), model.deltas()


WAYS: dict[str, Callable[[Run, Part], None]] = {
    "row": row,
    "all rows": all_rows,
    "direction": partial(direction, steps=10),
    "direction, a tenth of the rate": partial(direction, steps=10, rate=0.1),
    "direction, a tenth of the rate, 40 steps": partial(direction, steps=40, rate=0.1),
    "together": row,
}


def joined(parts: Sequence[Part]) -> Part:
    train = {c: own for part in parts for c, own in part.train.items()}
    test = {c: own for part in parts for c, own in part.test.items()}
    return Part("together", tuple(train), train, test, parts[0].source)


def part_of(run: Run, folder: Path) -> Part:
    source = splits.load_for(run.config, str(folder))
    found = splits.part(source, folder.name, source.classes, (), run.config)
    assert found is not None
    return found


def measure(name: str, way: str) -> dict[str, Any]:
    """Accuracy after 0, 5, 10 and 20 single classes, and what a packet weighs; kept in a file."""
    target = BUILD / f"{name}-{way}.json"
    if target.exists():
        found: dict[str, Any] = json.loads(target.read_text())
        return found
    with_base, new = folders(name)
    path = BUILD / f"{name}-{way}"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base_run(name), path)
    run = Run.open(path)
    first = splits.parts(
        splits.load(str(with_base), run.config.data.test_fraction, run.config.training.seed),
        run.config,
    )
    parts, begun = [part_of(run, folder) for folder in new], len(run.updates)
    rows = [score(run, first, [])]
    if way == "together":
        parts = [joined(parts)]
    for count, part in enumerate(parts, 1):
        WAYS[way](run, part)
        if count in (5, 10, len(parts)):
            rows.append(score(run, first, parts[:count]))
            print(name, way, rows[-1], flush=True)
    sizes = [run.packet_bytes(update) for update in run.updates[begun:]]
    result = {"scores": rows, "packet_bytes": float(np.mean(sizes))}
    target.write_text(json.dumps(result))
    return result


def score(run: Run, old: Sequence[Part], new: Sequence[Part]) -> dict[str, Any]:
    """Shares of right answers on test images, out of all classes known: of old classes, of new ones, and of all."""
    state, evaluator = run.states[-1], Evaluator.at(run, len(run.updates))
    right, total = {}, {}
    for side, parts in (("old", old), ("new", new)):
        right[side] = total[side] = 0
        for part in parts:
            test = splits.decode(part.test, part.classes, run.preprocessing, need=False)
            truth = np.array([state.classes.index(c) for c in part.classes])[test.targets]
            logits = logits_of(state, evaluator.features(test))
            right[side] += int((logits.argmax(axis=1) == truth).sum())
            total[side] += len(truth)
    shares = {side: right[side] / total[side] if total[side] else None for side in right}
    return {
        "classes": sum(len(part.classes) for part in new),
        **shares,
        "all": sum(right.values()) / sum(total.values()),
    }


def main() -> None:
    found = {name: {way: measure(name, way) for way in WAYS} for name in SETS}
    facts = {"sets": {name: COMMON | values for name, values in SETS.items()}, "seed": SEED}
    print(figures.write("one_class", "make bench-one-class", facts | found))


if __name__ == "__main__":
    main()

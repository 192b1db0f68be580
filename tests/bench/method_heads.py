"""Score a finished training with other heads, and its unknown score with images of no known class.

`python tests/bench/method_heads.py RUN OTHER` prints one line of JSON. Nothing is trained: everything is computed from features
under W_0 (frozen), W_1 (adapted in the first task only) and W_t of the run. OTHER is a dataset that is like nothing in the run's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.inputs.pictures import blank
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.method.merged import logits_of
from sdlora_edge.train import splits
from sdlora_edge.train.crops import with_crops
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.reliability import auroc
from sdlora_edge.train.run import Run
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.splits import Decoded
from sdlora_edge.train.tasks import read_kept

RANDOM_FEATURES, RIDGES = 10_000, 10.0 ** np.arange(-2, 7)
"""of RanPAC (McDonnell et al., NeurIPS 2023): M, and the strengths that it chooses from by a fifth of the training images"""
JUDGED = 3000
"""training images at most that such a choice is made with: an eigendecomposition of 6,400 takes minutes"""


def main(path: Path, other: str) -> None:
    run = Run.open(path)
    parts = splits.parts(splits.load_for(run.config, run.config.data.data), run.config)
    train, test = (
        [_read(run, getattr(part, which), part.classes) for part in parts]
        for which in ("train", "test")
    )
    last = run.kept.plain[0].shape[1]
    found: dict[str, Any] = {}
    for name, task in (("frozen", 0), ("first task", 1)):
        evaluator = Evaluator.at(run, task)
        seen = [(a, x.targets, evaluator.features(y), y.targets) for a, x, y in zip(_views(evaluator, train), train, test, strict=True)]  # fmt: skip
        found[f"{name} aligned"] = _stream(seen, lambda *data: _discriminant(*data, width=last))
        found[f"{name} wide"] = _stream(seen, _discriminant)
        found[f"{name} ranpac"] = {"last": ranpac(seen, last)}
    accuracy = []
    for task in range(1, len(run.states)):
        evaluator, statistics = Evaluator.at(run, task), read_kept(path, task).aligned
        assert statistics is not None
        features = [evaluator.features(images) for images in test[:task]]
        rows = _last(statistics, last).discriminant()
        accuracy.append(_right([f[:, :last] for f in features], [t.targets for t in test[:task]], rows))  # fmt: skip
    found["default last features"] = _summary(accuracy)
    statistics = run.kept.aligned
    assert statistics is not None
    true = statistics_of(_views(evaluator, train), [images.targets for images in train])
    oracle = FeatureStatistics(true.means, statistics.scatter, statistics.counts).discriminant()
    found["default true means"] = {"last": _right(features, [t.targets for t in test], oracle)}
    found["unknown"] = _unknown(run, test, other)
    print(json.dumps(found))


def _read(run: Run, images: Any, classes: Any) -> Decoded:
    """The images, their targets as head rows."""
    decoded = splits.decode(images, classes, run.preprocessing, need=True)
    rows = np.array([run.states[-1].classes.index(c) for c in classes])
    return Decoded(decoded.pixels, rows[decoded.targets])


def _views(evaluator: Evaluator, tasks: list[Decoded]) -> list[np.ndarray]:
    """What the trainer's statistics are made of: images and their crops, (views, n, d) for each task."""
    seed = evaluator.run.config.training.seed * 1009
    return [with_crops(evaluator, images, seed + task) for task, images in enumerate(tasks, 1)]


def _last(statistics: FeatureStatistics, width: int) -> FeatureStatistics:
    return FeatureStatistics(statistics.means[:, :width], statistics.scatter[:width, :width], statistics.counts)  # fmt: skip


def _discriminant(statistics: FeatureStatistics, width: int | None = None) -> Any:
    return (_last(statistics, width) if width else statistics).discriminant()


def statistics_of(views: list[np.ndarray], targets: list[np.ndarray]) -> FeatureStatistics:
    """Of tasks whose features never move. views: (views, n, d) of each task."""
    found = FeatureStatistics.empty(views[0].shape[-1])
    for features, own in zip(views, targets, strict=True):
        found = found.with_images(features, own, max(len(found.means), int(own.max()) + 1))
    return found


def _stream(seen: list[Any], fit: Any) -> dict[str, float]:
    """Features never move here: the statistics are exact."""
    statistics, accuracy = FeatureStatistics.empty(seen[0][0].shape[-1]), []
    for task, (features, targets, _, _) in enumerate(seen, 1):
        classes = max(len(statistics.means), int(targets.max()) + 1)
        statistics = statistics.with_images(features, targets, classes)
        weight, bias = fit(statistics)
        shown = [x[2][:, : weight.shape[1]] for x in seen[:task]]
        accuracy.append(_right(shown, [x[3] for x in seen[:task]], (weight, bias)))
    return _summary(accuracy)


def _right(features: list[np.ndarray], targets: list[np.ndarray], head: Any) -> float:
    weight, bias = head
    guess = (np.concatenate(features) @ weight.T + bias).argmax(axis=1)
    return 100 * float((guess == np.concatenate(targets)).mean())


def _summary(accuracy: list[float]) -> dict[str, float]:
    return {"last": accuracy[-1], "average_anytime": float(np.mean(accuracy))}


def ranpac(seen: list[Any], width: int) -> float:
    """RanPAC's head on the features of all tasks: its Gram matrix does not depend on their order. Last accuracy."""
    X, y, Z, z = map(np.concatenate, zip(*((a[0], *rest) for a, *rest in seen), strict=True))
    X, Z = X[:, :width], Z[:, :width]
    random = np.random.RandomState(0)
    projection = random.standard_normal((width, RANDOM_FEATURES)).astype(np.float32)
    wide, ones = np.maximum(X @ projection, 0), np.eye(y.max() + 1, dtype=np.float32)[y]
    order = random.permutation(len(y))
    some, rest = order[len(y) // 5 :][:JUDGED], order[: len(y) // 5]
    # With fewer images than random features, the dual form is the smaller system and the same head.
    K = wide @ wide.T
    values, vectors = np.linalg.eigh(K[np.ix_(some, some)].astype(np.float64))
    scores = [(K[np.ix_(rest, some)] @ vectors / (values + ridge) @ vectors.T @ ones[some]).argmax(axis=1) == y[rest] for ridge in RIDGES]  # fmt: skip
    ridge = RIDGES[int(np.argmax([s.mean() for s in scores]))]
    dual = np.linalg.solve(K + ridge * np.eye(len(K)), ones)
    guess = (np.maximum(Z @ projection, 0) @ wide.T @ dual).argmax(axis=1)
    return 100 * float((guess == z).mean())


def _unknown(run: Run, test: list[Decoded], other: str) -> dict[str, Any]:
    """AUROC and rates after half of the tasks."""
    task = len(test) // 2
    state, evaluator = run.state(task), Evaluator.at(run, task)
    confidence: Confidence = state.confidence

    def judged(images: Decoded) -> tuple[np.ndarray, np.ndarray]:
        features = evaluator.features(images)
        logits = logits_of(state, features)[:, state.live]
        return confidence.scores(logits, features), confidence.known(logits, features)

    def joined(images: list[Decoded]) -> tuple[np.ndarray, np.ndarray]:
        scores, known = zip(*map(judged, images), strict=True)
        return np.concatenate(scores), np.concatenate(known)

    known = joined(test[:task])
    source = splits.load_for(Settings.of(data=other), other)
    few = {label: list(images)[:4] for label, images in source.train.items()}
    strange = {"other_dataset": judged(splits.decode(few, list(few), run.preprocessing, need=True))}
    pixels = np.concatenate(list(blank(run.preprocessing.size, each=16, seed=2).values()))
    strange["black_and_noise"] = judged(Decoded(pixels, np.zeros(len(pixels), np.int64)))
    if not set(state.names) >= set(run.states[-1].names):
        strange["later_classes"] = joined(test[task:])
    return {
        "known_accepted": float(known[1].mean()),
        **{name: 100 * auroc(known[0], scores) for name, (scores, _) in strange.items()},
        **{
            f"{name}_rejected": float(1 - accepted.mean())
            for name, (_, accepted) in strange.items()
        },
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

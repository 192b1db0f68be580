"""How good the model is after each task: on every task's test images, by class and by domain, beside the frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..method.sdlora import features
from . import metrics, splits
from .fit import precision
from .images import ImageFile
from .run import Run
from .source import Source
from .splits import Decoded, Images, Part

log = logging.getLogger("sdlora_edge")
BATCH = 128


def seen_features(run: Run, weights: Mapping[str, np.ndarray], images: Images) -> np.ndarray:
    """What the head sees of all images under merged weights, in the run's precision: float32 (N, features)."""
    found = [np.zeros((0, run.plain[0].shape[1]), np.float32)]
    with precision(
        run.backbone, run.config.training.precision, next(run.backbone.parameters()).device
    ):
        for pixels in images.batches(slices(len(images)), run.config.training.workers):
            found.append(features(run.backbone, weights, run.preprocessing.normalise(pixels)))
    return np.concatenate(found)


def slices(count: int, size: int = BATCH) -> list[np.ndarray]:
    """0..count-1 in order, `size` at a time."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(eq=False)
class Scorer:
    """Scores a run's newest state; keeps every task's decoded test images (and their features under W_0) between tasks."""

    run: Run
    sources: dict[str, Source | None] = field(default_factory=dict)
    _tests: dict[int, Images | None] = field(default_factory=dict)
    _frozen: dict[int, np.ndarray] = field(default_factory=dict)

    def entry(
        self, part: Part, images: int, seconds: float, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """metrics.json of the newest task, which learned `part`.

        correct[i][j], totals[j]: as in `metrics.summary`; None where a task's images can no longer be read. plain_correct:
        the same with the plain head, unrounded; frozen_correct: of the frozen backbone with its own
        aligned head. per_class, confusions: of the newest state over all tasks.
        """
        run, state = self.run, self.run.states[-1]
        self.sources.setdefault(part.source, None)
        tests = [*self._earlier(state.task), self._of(state.task, part.test, part.classes)]
        weights = run.weights(len(run.updates))
        heads = {
            "correct": (state.head_weight, state.head_bias),
            "plain_correct": run.plain,
            "frozen_correct": run.frozen_head(),
        }
        rows: dict[str, list[int | None]] = {name: [] for name in heads}
        truths, guesses, errors = [], [], {}
        for task, test in tests:
            if test is None:
                for row in rows.values():
                    row.append(None)
                continue
            seen = seen_features(run, weights, test)
            if task not in self._frozen:
                self._frozen[task] = seen_features(run, {}, test)
            for name, (weight, bias) in heads.items():
                logits = (
                    self._frozen[task] if name == "frozen_correct" else seen
                ) @ weight.T + bias
                rows[name].append(
                    int((logits.argmax(axis=1) == test.targets).sum()) if len(test) else 0
                )
                if name == "correct" and len(test):
                    truths.append(test.targets)
                    guesses.append(logits.argmax(axis=1))
                    if len(state.classes) == 2 and (
                        found := metrics.binary(logits, test.targets, state.classes)
                    ):
                        errors[self._name(task, part)] = found
        matrices = {
            name: [*(entry[name][-1] for entry in run.metrics), row] for name, row in rows.items()
        }
        correct = matrices["correct"]
        totals = [*(entry["totals"][-1] for entry in run.metrics), len(tests[-1][1] or ())]
        whole = all(c is not None for row in correct for c in row) and all(totals)
        truth, guess = (
            np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (truths, guesses)
        )
        return {
            "task": state.task,
            "name": part.name,
            "classes": list(part.classes),
            "source": part.source,
            "domains": list(part.domains),
            "trained_on": splits.trained_on(part),
            "training_images": images,
            "seconds": round(seconds, 2),
            **facts,
            **matrices,
            "totals": totals,
            **(metrics.summary(correct, totals) if whole else {}),
            **({"hter": errors} if errors else {}),
            "per_class": metrics.per_class(truth, guess, state.classes),
            "confusions": metrics.confusions(truth, guess, state.classes),
        }

    def _name(self, task: int, part: Part) -> str:
        return next(
            (str(entry["name"]) for entry in self.run.metrics if entry["task"] == task), part.name
        )

    def _of(
        self, task: int, images: Mapping[str, Sequence[ImageFile]], classes: Sequence[str]
    ) -> tuple[int, Images | None]:
        """The test images of a task, kept decoded while there is room; targets index the classes of the run."""
        if task not in self._tests:
            used = sum(t.pixels.nbytes for t in self._tests.values() if isinstance(t, Decoded))
            room = self.run.config.training.cache_gb - used / 2**30
            test = splits.read(images, classes, self.run.preprocessing, room, need=False)
            index = np.array([self.run.states[-1].classes.index(c) for c in classes])
            self._tests[task] = replace(test, targets=index[test.targets])
        return task, self._tests[task]

    def _earlier(self, task: int) -> Iterator[tuple[int, Images | None]]:
        known = [entry for entry in self.run.metrics if entry["task"] < task]
        missing = [e for e in known if e["task"] not in self._tests]
        found = (
            test_images(self.run, task - 1, *(s for s in self.sources.values() if s))
            if missing
            else {}
        )
        for entry in known:
            images = found.get(entry["task"])
            if images is None and entry["task"] not in self._tests:
                self._tests[entry["task"]] = None
            yield self._of(entry["task"], images or {}, entry["classes"])


def test_images(
    run: Run, task: int, *sources: Source
) -> dict[int, dict[str, Sequence[ImageFile]] | None]:
    """By task up to `task`: the test images of each of its classes, or None where they can no longer be read.

    sources: already open; the others are opened where the run says they lie.
    """
    opened: dict[str, Source | None] = {source.name: source for source in sources}
    found: dict[int, dict[str, Sequence[ImageFile]] | None] = {}
    for entry in run.metrics[: task + 1]:
        if entry["task"] > task:
            break
        if (name := entry["source"]) not in opened:
            try:
                opened[name] = splits.load_for(run.config, name)
            except InputError as error:
                log.warning("the images of task %d cannot be read: %s", entry["task"], error)
                opened[name] = None
        source = opened[name]
        part = source and splits.part(
            source, entry["name"], entry["classes"], entry.get("domains", ()), run.config
        )
        if source and not part:
            log.warning(
                "%s no longer has the classes of task %d: that task is left out of the score",
                name,
                entry["task"],
            )
        if (
            part and splits.trained_on(part) != entry["trained_on"]
        ):  # split anew, it would be tested on what it was trained on
            log.warning(
                "%s has changed since task %d was learned: that task is left out of the score",
                name,
                entry["task"],
            )
            part = None
        found[entry["task"]] = dict(part.test) if part else None
    return found


def test_images_by_class(run: Run, task: int) -> dict[str, list[ImageFile]]:
    """All test images up to `task` that can still be read, those of one class from several tasks together."""
    found: dict[str, list[ImageFile]] = {}
    for images in test_images(run, task).values():
        for label, own in (images or {}).items():
            found.setdefault(label, []).extend(own)
    return found

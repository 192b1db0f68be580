"""How good the model is after each task: on every task's test images, by class and by domain,
beside the frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..formats.confidence import Confidence
from ..method.sdlora import Head
from ..state import TaskState, advance
from . import metrics, reliability, splits
from .evaluator import Evaluator, known_scores
from .items import Item
from .metrics import Hter
from .run import Run
from .source import Source
from .splits import Decoded, Images, Part
from .tasks import Kept, TaskResult

log = logging.getLogger("sdlora_edge")
HEADS = "correct", "plain_correct", "frozen_correct"
"""keys of metrics.json: the shipped head; the plain head; the frozen backbone with an aligned head
of its own"""


@dataclass(frozen=True, eq=False)
class Learned:
    """A run's state to score: after its newest task, or after a result that is not written yet."""

    state: TaskState
    kept: Kept
    weights: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, run: Run, result: TaskResult | None = None) -> Learned:
        """The state after `result`; None stands for the run's newest state."""
        if result is None:
            return cls(run.states[-1], run.kept, run.weights(len(run.updates)))
        update = result.update
        weights = run.weights_with(update.factors, update.deltas)
        return cls(advance(run.states[-1], update), result.kept, weights)

    def heads(self) -> dict[str, Head]:
        """The heads by the names of HEADS."""
        shipped = self.state.head_weight, self.state.head_bias
        heads = shipped, self.kept.plain, self.kept.frozen.discriminant(self.state.live)
        return dict(zip(HEADS, heads, strict=True))


@dataclass(eq=False)
class _Tally:
    """What is counted while the tasks' test images are answered."""

    rows: dict[str, list[int | None]] = field(default_factory=lambda: {name: [] for name in HEADS})
    totals: list[int] = field(default_factory=list)
    truths: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    guesses: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    logits: list[np.ndarray] = field(default_factory=list)
    known: list[np.ndarray] = field(default_factory=list)
    hter: dict[str, Hter] = field(default_factory=dict)
    complete: bool = True

    def skip(self, total: int) -> None:
        """A task whose images cannot be read; total: how many there were."""
        for row in self.rows.values():
            row.append(None)
        self.totals.append(total)
        self.complete = False


@dataclass(eq=False)
class Scorer:
    """Scores a run's states.

    It keeps the decoded test images of all tasks, and their features under W_0, between tasks.
    """

    run: Run
    sources: dict[str, Source | None] = field(default_factory=dict)
    _tests: dict[int, Images | None] = field(default_factory=dict)
    _frozen: dict[int, np.ndarray] = field(default_factory=dict)
    _rows: dict[int, np.ndarray] = field(default_factory=dict)

    def entry(self, part: Part, learned: Learned, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Make the metrics.json of the newest task, which has learned `part`.

        correct[i][j]: as in `metrics.summary`; None if the images of task j could not be read then.
        plain_correct, frozen_correct: the same with the other HEADS. totals[j]: test images of task
        j that count now. counted[i][j]: how many counted after task i; those of retired classes do
        not. per_class, confusions, calibration, unknown: of the newest state over all tasks.
        training_by_class: images that each class of this task was learned from. unknown: only if
        the state can answer "unknown".
        """
        state, tally = learned.state, self._tally(part, learned)
        matrices = {
            name: [*(entry[name][-1] for entry in self.run.metrics), row]
            for name, row in tally.rows.items()
        }
        counted = [*(entry["counted"][-1] for entry in self.run.metrics), tally.totals]
        complete = tally.complete and all("accuracy" in entry for entry in self.run.metrics)
        truth, guess = np.concatenate(tally.truths), np.concatenate(tally.guesses)
        return {
            "task": state.task,
            "name": part.name,
            "classes": list(part.classes),
            "source": part.source,
            "domains": list(part.domains),
            "trained_on": splits.trained_on(part),
            "training_by_class": {name: len(part.train[name]) for name in part.classes},
            **facts,
            **matrices,
            "totals": tally.totals,
            "counted": counted,
            **(metrics.summary(matrices["correct"], counted).to_dict() if complete else {}),
            **({"hter": {n: h.to_dict() for n, h in tally.hter.items()}} if tally.hter else {}),
            "per_class": metrics.per_class(truth, guess, state.classes),
            "confusions": metrics.confusions(truth, guess, state.classes),
            **_certainty(state.confidence, tally, guess == truth),
        }

    def _tally(self, part: Part, learned: Learned) -> _Tally:
        """Answer the test images of every task with every head."""
        self.sources.setdefault(part.source, None)
        evaluator, frozen = Evaluator(self.run, learned.weights), Evaluator(self.run, {})
        tally, heads, state = _Tally(), learned.heads(), learned.state
        live = np.array([name is not None for name in state.classes], bool)
        for task, test in self._all_tests(part, state):
            if test is None:
                tally.skip(self._entry(task)["totals"][-1])
                continue
            if task not in self._frozen:
                self._frozen[task] = frozen.features(test)
            counts = live[test.targets]
            truth, seen = test.targets[counts], evaluator.features(test)
            tally.totals.append(len(truth))
            # A task without a class that can be answered has nothing to score; any other one should
            # have.
            tally.complete &= len(truth) > 0 or not live[self._rows[task]].any()
            for name, (weight, bias) in heads.items():
                features = self._frozen[task] if name == "frozen_correct" else seen
                # The plain head sees the backbone's own features, which come first.
                logits = (features[:, : weight.shape[1]] @ weight.T + bias)[counts]
                guess = logits.argmax(axis=1) if len(logits) else np.zeros(0, np.int64)
                tally.rows[name].append(int((guess == truth).sum()))
                if name == "correct":
                    tally.truths.append(truth)
                    tally.guesses.append(guess)
                    tally.logits.append(logits[:, live])
                    tally.known.append(known_scores(state, logits, seen[counts]))
                    if found := metrics.binary(logits, truth, state.classes):
                        tally.hter[
                            part.name if task == state.task else self._entry(task)["name"]
                        ] = found
        return tally

    def _entry(self, task: int) -> dict[str, Any]:
        return next(entry for entry in self.run.metrics if entry["task"] == task)

    def _all_tests(self, part: Part, state: TaskState) -> Iterator[tuple[int, Images | None]]:
        """Yield (task, its test images) of every scored task and the newest one.

        The images are None if they cannot be read.
        """
        known = [entry for entry in self.run.metrics if entry["task"] < state.task]
        found: dict[int, dict[str, Sequence[Item]] | None] = {}
        if any(entry["task"] not in self._tests for entry in known):
            opened = (source for source in self.sources.values() if source)
            found = test_images(self.run, state.task - 1, *opened)
        for entry in known:
            task = entry["task"]
            if task not in self._tests:
                images = found.get(task)
                self._tests[task] = None
                if images is not None:
                    self._read(task, images, entry["classes"], self.run.states[task])
            yield task, self._tests[task]
        if state.task not in self._tests:
            self._read(state.task, part.test, part.classes, state)
        yield state.task, self._tests[state.task]

    def _read(
        self,
        task: int,
        images: Mapping[str, Sequence[Item]],
        classes: Sequence[str],
        state: TaskState,
    ) -> None:
        """Read the test images of a task, and keep them decoded while there is room.

        state: that after the task. Targets are head rows: they never move, whatever becomes of the
        classes' names.
        """
        used = sum(t.pixels.nbytes for t in self._tests.values() if isinstance(t, Decoded))
        room = self.run.config.training.cache_gb - used / 2**30
        test = splits.read(images, classes, self.run.preprocessing, room, need=False)
        rows = np.array([state.classes.index(c) for c in classes], np.int64)
        self._rows[task], self._tests[task] = rows, replace(test, targets=rows[test.targets])


def _certainty(confidence: Confidence, tally: _Tally, correct: np.ndarray) -> dict[str, Any]:
    """What `Scorer.entry` tells of calibration and unknown."""
    if not len(correct):
        return {}
    found = reliability.calibrated(confidence, np.concatenate(tally.logits), correct)
    known = reliability.acceptance(confidence, np.concatenate(tally.known))
    unknown = {"unknown": known.to_dict()} if confidence.tells_unknown else {}
    return {"calibration": found.to_dict(), **unknown}


def test_images(
    run: Run, task: int, *sources: Source
) -> dict[int, dict[str, Sequence[Item]] | None]:
    """Find the test images of each task up to `task`, by class.

    None stands for a task whose images can no longer be read. sources: those that are open already;
    others are opened at the place that the run has noted.
    """
    opened: dict[str, Source | None] = {source.name: source for source in sources}
    found: dict[int, dict[str, Sequence[Item]] | None] = {}
    for entry in run.metrics[: task + 1]:
        if entry["task"] > task:
            break
        if not entry["classes"]:  # it only retired or renamed classes
            found[entry["task"]] = {}
            continue
        if (name := entry["source"]) not in opened:
            try:
                opened[name] = splits.load_for(run.config, name)
            except InputError as error:
                log.warning("the data of task %d cannot be read: %s", entry["task"], error)
                opened[name] = None
        source = opened[name]
        part = source and splits.part(
            source, entry["name"], entry["classes"], entry.get("domains", ()), run.config
        )
        if source and not part:
            log.warning(
                "%s no longer has the classes of task %d: it is left out of the score",
                name,
                entry["task"],
            )
        # A source that is split differently now would be tested on images that it was trained on.
        if part and splits.trained_on(part) != entry["trained_on"]:
            log.warning(
                "%s has changed since task %d was learned: it is left out of the score",
                name,
                entry["task"],
            )
            part = None
        found[entry["task"]] = dict(part.test) if part else None
    return found


def test_images_by_class(run: Run, task: int) -> dict[str, list[Item]]:
    """Find all test images up to `task` that can still be read, by today's class names.

    Images of one class from several tasks come together; those of retired classes are left out.
    """
    found: dict[str, list[Item]] = {}
    names = run.states[task].classes
    for number, images in test_images(run, task).items():
        for label, own in (images or {}).items():
            row = run.states[number].classes.index(label)
            if (name := names[row]) is not None:
                found.setdefault(name, []).extend(own)
    return found

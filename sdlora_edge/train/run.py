"""A run on disk: what the host keeps of each task, and nothing that could show an image.

    config.toml           the resolved settings; recorded: versions, digest of the backbone
    backbone.safetensors  W_0 and the rest of the frozen backbone: any machine can go on
    tasks/NNN/state.safetensors
                          task NNN as it is shipped: factors and head rows; in its metadata names,
                          magnitude deltas, retired and renamed classes
    tasks/NNN/statistics.safetensors
                          never shipped: `Kept`, and the factors before they were encoded
    tasks/NNN/metrics.json
                          `correct` and `totals` of every task so far, their summary, source, timing
    run.lock              held by the process that trains the run
    partial.pt            the epoch of the task in training (`fit.Checkpoint`)
    pending.json          the task that is being added (`folder.Pending`)
    revisions.json        {task: revision}, if `packet build --revision` replaced a revoked task

tasks/000 is the state before the first task: the base head, if there was a base session.
runs/latest points to the newest run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import nn

from ..errors import InputError, UsageError
from ..formats import packet, signing
from ..formats.canonical import dump_json, tensors_digest
from ..formats.encoding import ENCODINGS, Factors, encode
from ..inputs import canary
from ..inputs.modality import Preparation, kind_of, preparation
from ..method import backbones
from ..method.feature_spec import FeatureSpec
from ..method.merged import adapted_weights
from ..method.sdlora import Past
from ..state import Projection, TaskState, TaskUpdate, advance, extended, lineage_id
from ..state import merge as merged
from ..storage import atomic
from . import config, folder
from .folder import BACKBONE, CONFIG, METRICS, REVISIONS
from .history import History
from .kinds import Wanted, modality
from .settings import Settings
from .tasks import (
    Kept,
    TaskResult,
    folder_of,
    load,
    metrics_json,
    read_kept,
    read_learned,
    read_update,
    save,
    write_task,
)

__all__ = ["Base", "Run"]
ARCHITECTURE = "architecture"
"""what a backbone says of itself if its name does not say all"""
HELD = 4
"""tasks whose factors as they were learned are held"""


@dataclass(frozen=True, eq=False)
class Base:
    """The state before the first task.

    update: as it is shipped, task 0. seconds: how long the base session took.
    """

    update: TaskUpdate
    kept: Kept
    seconds: float = 0.0


@dataclass(eq=False)
class Run:
    """An opened run.

    Attributes:
        base_weights: W_0 of every adapted weight, {tensor: float32 (rows, columns)}.
        history: The states and updates of its tasks, read when they are asked for.
    """

    path: Path
    config: Settings
    backbone: nn.Module
    preprocessing: Preparation
    projections: tuple[Projection, ...]
    backbone_digest: str
    base_weights: dict[str, np.ndarray]
    base_seconds: float
    lineage: str
    history: History

    @classmethod
    def begin(cls, path: Path, settings: Settings) -> None:
        """Make the folder of a run, with its settings only.

        Raises UsageError if it exists.
        """
        with atomic.new_folder(path) as new:
            atomic.write(new / CONFIG, config.to_toml(settings).encode())

    @classmethod
    def settings(cls, path: Path) -> Settings:
        """Read the settings of a run. Raises InputError if the folder is not a run."""
        return folder.settings(path)

    @classmethod
    def is_begun(cls, path: Path) -> bool:
        """Tell whether the run has its backbone, so that tasks can follow."""
        return folder.is_begun(path)

    @classmethod
    def create(
        cls,
        path: Path,
        settings: Settings,
        backbone: nn.Module,
        preprocessing: Preparation,
        base: Base,
    ) -> Run:
        """Give a run that was begun its backbone and the state before its first task."""
        weights = {name: t.detach().cpu().numpy() for name, t in backbone.state_dict().items()}
        shutil.rmtree(path / "tasks", ignore_errors=True)  # of a run that was killed just here
        write_task(path, TaskResult(base.update, base.kept), digest="")
        digest = tensors_digest(weights)
        recorded = {"recorded": config.recorded() | {"backbone_sha256": digest}}
        atomic.write(
            path / CONFIG, (config.to_toml(settings) + "\n" + tomli_w.dumps(recorded)).encode()
        )
        facts = {
            "preprocessing": dump_json(preprocessing.to_manifest()).decode(),
            "base_seconds": f"{base.seconds:.2f}",
        }
        if known := getattr(backbone, ARCHITECTURE, ""):
            facts[ARCHITECTURE] = known
        for name, data in preprocessing.files.items():
            atomic.write(path / name, data)
        # The backbone comes last: a run that has it is complete.
        save(path / BACKBONE, weights, facts)
        return cls._with(path, settings, backbone, digest, facts)

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Read a run. Raises InputError if a file is missing or does not fit the others."""
        path = Path(path)
        settings = folder.require_begun(path)
        asked = settings.backbone
        tensors, facts = load(path / BACKBONE)
        known = facts.get(ARCHITECTURE, "")
        wanted = Wanted(asked.backbone, asked.image_size, asked.max_tokens, architecture=known)
        backbone, _ = modality(kind_of(asked.backbone)).create(wanted)
        try:
            backbone.load_state_dict({n: torch.from_numpy(array) for n, array in tensors.items()})
        except RuntimeError as error:
            raise _does_not_fit(path, settings, error) from error
        return cls._with(path, settings, backbone, tensors_digest(tensors), facts)

    @classmethod
    def _with(
        cls,
        path: Path,
        settings: Settings,
        backbone: nn.Module,
        digest: str,
        facts: Mapping[str, str],
    ) -> Run:
        """The run in a folder whose backbone is loaded. facts: the metadata of its file."""
        try:
            preprocessing = preparation(json.loads(facts["preprocessing"]), path)
            seconds = float(facts["base_seconds"])
            projections = backbones.projections(backbone, settings.backbone.targets)
        except (KeyError, ValueError) as error:
            raise _does_not_fit(path, settings, error) from error
        base, _ = read_update(path, 0, [], settings.method.encoding)
        head, encoding = (base.head.new_weight, base.head.new_bias), settings.method.encoding
        what = projections, encoding, base.classes, head, settings.method.features
        lineage = lineage_id(digest, *what)
        known = base.head.confidence
        first = TaskState(0, base.name, lineage, base.classes, np.zeros(0), *head, {}, known)
        names = [p.name for p in projections]
        history = History(
            first, lambda task: read_update(path, task, names, settings.method.encoding)[0]
        )
        run = cls(
            path=path,
            config=settings,
            backbone=backbone,
            preprocessing=preprocessing,
            projections=projections,
            backbone_digest=digest,
            base_weights=adapted_weights(backbone, projections),
            base_seconds=seconds,
            lineage=lineage,
            history=history,
        )
        run.read_new()
        return run

    def read_new(self) -> None:
        """Take the tasks that were written since, by this process or another."""
        names, last = [p.name for p in self.projections], folder.last_task(self.path)
        for task in range(len(self.states), last + 1):
            update, digest = read_update(self.path, task, names, self.config.method.encoding)
            self.history.follow(update, written=True)
            # Each digest covers all tasks before it, so one comparison finds any task that was
            # changed or swapped.
            if self.states[-1].digest != digest:
                raise InputError(
                    f"{self.path}: task {task} does not follow from the tasks before it: "
                    "restore the run from a backup"
                )
        for name in ("kept", "metrics"):  # they are read again when they are asked for
            self.__dict__.pop(name, None)

    def append(self, result: TaskResult) -> None:
        """Write a task as the newest: its folder appears whole or not at all."""
        state, metrics = advance(self.states[-1], result.update), self.metrics
        write_task(self.path, result, state.digest)
        self.history.follow(result.update, written=True)
        self.kept = result.kept
        if result.metrics is not None:
            metrics.append(dict(result.metrics))

    def score_base(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of the base session."""
        atomic.write(folder_of(self.path, 0) / METRICS, metrics_json(metrics))
        self.metrics = [dict(metrics)]

    @property
    def features(self) -> FeatureSpec:
        """What the head sees."""
        return FeatureSpec.parse(self.config.method.features)

    @property
    def states(self) -> Sequence[TaskState]:
        """states[t] is the state after task t, states[0] the one before the first."""
        return self.history.states

    @property
    def updates(self) -> Sequence[TaskUpdate]:
        """updates[t - 1] is task t as it is shipped."""
        return self.history.updates

    @cached_property
    def kept(self) -> Kept:
        """What the host keeps of all classes so far."""
        return read_kept(self.path, folder.last_task(self.path))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.json of every scored task; of task 0 too, if there was a base session."""
        return folder.metrics(self.path)

    @property
    def past(self) -> Past:
        """Return what the next task begins with."""
        factors = self.factors(len(self.updates))
        return Past(self.projections, factors, self.states[-1].magnitudes)

    def encoded(self, encoding: str) -> Run:
        """Return this run as if its factors were shipped in another encoding.

        It has another lineage, and the same tasks and head rows. The factors are encoded from what
        was learned; magnitudes and rows are those of the run itself. Raises UsageError for an
        unknown encoding.
        """
        if encoding not in ENCODINGS:
            raise UsageError(f"unknown encoding {encoding!r}: choose one of {', '.join(ENCODINGS)}")
        if encoding == self.config.method.encoding:
            return self

        def update(task: int) -> TaskUpdate:
            exact = self.learned(task).items()
            factors = {name: encode(f, encoding) for name, f in exact}
            return replace(self.history.update(task), factors=factors)

        first = self.states[0]
        head = first.head_weight, first.head_bias
        base = encoding, first.classes, head, self.config.method.features
        lineage = lineage_id(self.backbone_digest, self.projections, *base)
        history = History(replace(first, digest=lineage), update)
        for task in range(1, len(self.states)):
            history.follow(update(task), written=True)
        own = self.config.changed(encoding=encoding)
        return replace(self, config=own, lineage=lineage, history=history)

    def learned(self, task: int) -> Mapping[str, Factors]:
        """The factors of a task, float32, before they were encoded."""
        return self._learned(task)

    @cached_property
    def _learned(self) -> Callable[[int], Mapping[str, Factors]]:
        names = [p.name for p in self.projections]
        return lru_cache(HELD)(lambda task: read_learned(self.path, task, names))

    def weight_error(self, task: int) -> float:
        """Measure what the encoding loses after `task`.

        Returns the largest difference of an adapted weight to what the factors as they were learned
        give.
        """
        exact = merged(
            self.base_weights,
            self.projections,
            [self.learned(k) for k in range(1, task + 1)],
            self.states[task].magnitudes,
        )
        shipped = self.weights(task)
        return max(float(np.abs(shipped[name] - exact[name]).max()) for name in exact)

    def revision(self, task: int) -> int:
        """The revision of a task: 0, or what `revise` has set for it or for a task before it."""
        return folder.revision(self.path, task)

    def revise(self, task: int, revision: int) -> None:
        """Give `task` and all later tasks this revision.

        Raises UsageError if they had a higher one.
        """
        with folder.locked(self.path):
            if revision > folder.require_revision(self.path, revision):
                revisions = {
                    str(t): self.revision(t)
                    for t in range(1, len(self.states))
                    if self.revision(t) != self.revision(t - 1)
                }
                kept = {first: r for first, r in revisions.items() if int(first) < task}
                atomic.write(self.path / REVISIONS, dump_json({**kept, str(task): revision}))

    def state(self, task: int | None) -> TaskState:
        """The state after a task; None is the last.

        Raises UsageError if the run has no such task.
        """
        if task is None:
            return self.states[-1]
        if not 0 <= task < len(self.states):
            raise UsageError(
                f"{self.path} has the tasks 0 to {len(self.states) - 1}, not {task}: "
                "name one of them"
            )
        return self.states[task]

    def factors(self, task: int) -> list[Mapping[str, Factors]]:
        """Return the factors of the tasks 1 to `task`, as they are shipped."""
        return [update.factors for update in self.updates[:task]]

    def weights(self, task: int) -> dict[str, np.ndarray]:
        """Merge W_t of every adapted weight, by the one rule of arithmetic.

        Returns {tensor: float32 (rows, columns)}.
        """
        return merged(
            self.base_weights, self.projections, self.factors(task), self.states[task].magnitudes
        )

    def weights_with(
        self, factors: Mapping[str, Factors], deltas: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Merge W_t as it will be after one more task of this direction and these deltas."""
        past = self.past
        magnitudes = extended(past.magnitudes, deltas) + deltas
        return merged(self.base_weights, self.projections, [*past.factors, factors], magnitudes)

    def packet_bytes(self, update: TaskUpdate) -> int:
        """Return the size of a task's packet, signed with one key.

        It is the size that `packet build` writes, except for the few numbers of the canary.
        """
        before = self.states[update.task - 1]
        live = advance(before, update).live
        contents = packet.Contents(
            lineage=self.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=update.task,
            canary_logits=np.zeros((canary.COUNT, len(live)), np.float32),
            encoding=self.config.method.encoding,
        )
        return len(packet.build(contents, signing.unsigned))


def _does_not_fit(path: Path, settings: Settings, error: Exception) -> InputError:
    return InputError(
        f"{path / BACKBONE} does not fit the backbone {settings.backbone.backbone} ({error}): "
        "restore the run from a backup"
    )

"""A run on disk: what the host keeps of each task, and nothing it could read an image from.

    config.toml                  the resolved settings; versions and the backbone's digest, recorded
    backbone.safetensors         W_0 and the rest of the frozen backbone: a run can be gone on with on any machine
    tasks/NNN/state.safetensors  task N as it is shipped (factors, head rows); names and magnitude deltas in its metadata
    tasks/NNN/statistics.safetensors   its factors before they were encoded; the plain head; counts, means and scatter of the features under W_0, and where the head
                                 is aligned under W_N (never shipped)
    run.lock                     held by the process that trains it
    partial.pt                   the epoch that a task in training is in (`fit.Checkpoint`)
    tasks/NNN/metrics.json       `correct` and `totals` of every task so far, their summary, source and timing

    revisions.json               {task: revision}, where `packet build --revision` has replaced a revoked task

tasks/000 is the state before the first task: the base head, if there was a base session. runs/latest points to the newest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tomli_w
import torch
from torch import nn

from ..errors import InputError, UsageError
from ..formats import packet, signing
from ..formats.canonical import dump_json, parse_json, tensors_digest
from ..formats.encoding import ENCODINGS, Factors, HeadUpdate, encode
from ..inputs import canary
from ..inputs.image import Preprocessing
from ..method import backbones
from ..method.head import FeatureStatistics
from ..method.sdlora import adapted_weights
from ..shortage import verdict
from ..state import (
    Projection,
    TaskState,
    TaskUpdate,
    advance,
    changed_rows,
    extended,
    factor_tensors,
    factors_from,
    lineage_id,
    merge,
)
from ..storage import atomic
from . import config, folder
from .folder import BACKBONE, CONFIG, METRICS, REVISIONS, STATE, STATISTICS, newest, point_latest
from .settings import Settings

__all__ = ["Run", "newest", "point_latest"]
EXACT = "exact."


@dataclass(eq=False)
class Run:
    """An opened run. states[t] is the state after task t (states[0] before the first); updates[t - 1] is task t as shipped."""

    path: Path
    config: Settings
    backbone: nn.Module
    preprocessing: Preprocessing
    projections: tuple[Projection, ...]
    lineage: str
    states: list[TaskState]
    updates: list[TaskUpdate] = field(default_factory=list)
    statistics: FeatureStatistics | None = None
    """of all classes so far, under the newest weights; None where the head is not aligned"""
    plain: tuple[np.ndarray, np.ndarray] = (np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    """(weight, bias) of the plain head, float32 (C, features), (C,): every row as its task trained it, whatever head is shipped"""
    frozen: FeatureStatistics = field(default_factory=lambda: FeatureStatistics.empty(0))
    """of all classes so far, under W_0: the frozen reference"""
    base_weights: dict[str, np.ndarray] = field(default_factory=dict)
    """W_0 of every adapted weight: {tensor: float32 (rows, columns)}"""
    backbone_digest: str = ""
    base_seconds: float = 0.0
    exact: Mapping[str, Factors] = field(default_factory=dict)
    """of the newest task: its factors as they were learned, float32, before they were encoded"""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """metrics.json of every scored task: of task 0 too, where there was a base session"""
    _learned: dict[int, Mapping[str, Factors]] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path, settings: Settings) -> None:
        """Make the folder of a run that has nothing yet but its settings. Raises UsageError where it exists."""
        with atomic.new_folder(path) as new:
            atomic.write(new / CONFIG, config.to_toml(settings).encode())

    @classmethod
    def settings(cls, path: Path) -> Settings:
        """Raises InputError where the folder is not a run."""
        return folder.settings(path)

    @classmethod
    def is_begun(cls, path: Path) -> bool:
        """Has the run its backbone, so that tasks can follow?"""
        return folder.is_begun(path)

    @classmethod
    def create(
        cls,
        path: Path,
        settings: Settings,
        backbone: nn.Module,
        preprocessing: Preprocessing,
        base: tuple[str, tuple[str, ...], np.ndarray, np.ndarray],
        frozen: FeatureStatistics,
        plain: tuple[np.ndarray, np.ndarray],
        seconds: float = 0.0,
    ) -> Run:
        """Give a run that was begun its backbone. base: (name, classes, head weight float32 (C, features), head bias (C,)).

        frozen: of the base classes under W_0; plain: their plain head; seconds: what the base session took. The backbone is written last: with it the run is whole.
        """
        weights = {
            name: tensor.detach().cpu().numpy() for name, tensor in backbone.state_dict().items()
        }
        name, classes, head_weight, head_bias = base
        width = head_weight.shape[1]
        nothing = TaskState(
            0,
            "",
            "",
            (),
            np.zeros(0),
            np.zeros((0, width), np.float32),
            np.zeros(0, np.float32),
            {},
        )
        update = TaskUpdate(
            0, name, classes, np.zeros(0), changed_rows(nothing, head_weight, head_bias), {}
        )
        shutil.rmtree(path / "tasks", ignore_errors=True)  # of a run killed before it was whole
        _write_task(
            path,
            update,
            frozen if settings.method.head == "aligned" else None,
            frozen,
            plain,
            {},
            None,
        )
        recorded = {"recorded": config.recorded() | {"backbone_sha256": tensors_digest(weights)}}
        atomic.write(
            path / CONFIG, (config.to_toml(settings) + "\n" + tomli_w.dumps(recorded)).encode()
        )
        facts = {
            "preprocessing": dump_json(preprocessing.to_manifest()).decode(),
            "base_seconds": f"{seconds:.2f}",
        }
        _save(path / BACKBONE, weights, facts)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run. Raises InputError where a file is missing or does not fit the others."""
        settings = folder.require_begun(path)
        backbone, _ = backbones.create(
            settings.backbone.backbone, settings.backbone.image_size or None, None, pretrained=False
        )
        tensors, facts = _load(path / BACKBONE)
        try:
            preprocessing = Preprocessing.from_manifest(json.loads(facts["preprocessing"]))
            base_seconds = float(facts["base_seconds"])
            backbone.load_state_dict(
                {name: torch.from_numpy(array) for name, array in tensors.items()}
            )
            projections = backbones.projections(backbone, settings.backbone.targets)
            base, _ = _read_task(path, 0, [], settings.method.encoding)
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path / BACKBONE} does not fit {settings.backbone.backbone}: {error}"
            ) from error
        head, digest = (
            (base.head.new_weight.astype(np.float32), base.head.new_bias),
            tensors_digest(tensors),
        )
        lineage = lineage_id(digest, projections, settings.method.encoding, base.classes, head)
        first = TaskState(0, base.name, lineage, base.classes, np.zeros(0), *head, {})
        run = cls(path, settings, backbone, preprocessing, projections, lineage, [first])
        run.base_weights, run.base_seconds = adapted_weights(backbone, projections), base_seconds
        run.backbone_digest = digest
        run._read_rest(0)
        while (path / "tasks" / f"{len(run.states):03d}").is_dir():
            update, digest = _read_task(
                path, len(run.states), [p.name for p in projections], settings.method.encoding
            )
            run.follow(update)
            if run.states[-1].digest != digest:
                raise InputError(
                    f"{path}: task {update.task} does not follow from the tasks before it"
                )
            run._read_rest(update.task)
        return run

    def reopen(self) -> None:
        """Take what another process has written since."""
        self.__dict__.update(Run.open(self.path).__dict__)

    def follow(self, update: TaskUpdate) -> None:
        """Take a finished task as the newest, in memory."""
        self.states.append(advance(self.states[-1], update))
        self.updates.append(update)

    def record(self, metrics: dict[str, Any]) -> None:
        """Write the newest task and its metrics: the folder appears whole or not at all. (Of task 0 the metrics alone.)"""
        self.metrics.append(metrics)
        if self.updates:
            digest = self.states[-1].digest
            _write_task(
                self.path,
                self.updates[-1],
                self.statistics,
                self.frozen,
                self.plain,
                self.exact,
                metrics,
                digest,
            )
        else:
            atomic.write(self.path / "tasks" / "000" / METRICS, _metrics_json(metrics))

    def encoded(self, encoding: str) -> Run:
        """This run as if its factors were shipped in another encoding: another lineage, with the same tasks and head rows.

        The factors are encoded anew from what was learned; the magnitudes and rows are those of the run itself. Raises UsageError
        for an encoding that there is not.
        """
        if encoding not in ENCODINGS:
            raise UsageError(f"encoding {encoding!r} is none of {', '.join(ENCODINGS)}")
        if encoding == self.config.method.encoding:
            return self
        first = self.states[0]
        lineage = lineage_id(
            self.backbone_digest,
            self.projections,
            encoding,
            first.classes,
            (first.head_weight, first.head_bias),
        )
        view = replace(
            self, config=self.config.changed(encoding=encoding), lineage=lineage, updates=[]
        )
        view.states = [replace(first, digest=lineage)]
        for update in self.updates:
            exact = self.learned(update.task)
            view.follow(
                replace(
                    update,
                    factors={name: encode(factors, encoding) for name, factors in exact.items()},
                )
            )
        return view

    def learned(self, task: int) -> Mapping[str, Factors]:
        """The factors of a task, float32, before they were encoded."""
        if task not in self._learned:
            tensors, _ = _load(self.path / "tasks" / f"{task:03d}" / STATISTICS)
            self._learned[task] = factors_from(tensors, [p.name for p in self.projections], EXACT)
        return self._learned[task]

    def weight_error(self, task: int) -> float:
        """The largest difference of an adapted weight after `task` to what the factors as they were learned would give."""
        exact = merge(
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
        """From now on, `task` and those after it are of this revision. Raises UsageError where they had a higher one."""
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
        """The state after a task; None is the last. Raises UsageError where the run has no such task."""
        if task is None:
            return self.states[-1]
        if not 0 <= task < len(self.states):
            raise UsageError(f"{self.path} has the tasks 0 to {len(self.states) - 1}, not {task}")
        return self.states[task]

    def factors(self, task: int) -> list[Mapping[str, Factors]]:
        """Of the tasks 1 to `task`, as shipped."""
        return [u.factors for u in self.updates[:task]]

    def weights(self, task: int) -> dict[str, np.ndarray]:
        """W_t of every adapted weight: {tensor: float32 (rows, columns)}, by the one rule of arithmetic."""
        return merge(
            self.base_weights, self.projections, self.factors(task), self.states[task].magnitudes
        )

    def weights_with(
        self, directions: Mapping[str, Factors], deltas: np.ndarray
    ) -> dict[str, np.ndarray]:
        """W_t as it will be after one more task of these directions and magnitude deltas."""
        factors = [*self.factors(len(self.updates)), directions]
        magnitudes = extended(self.states[-1].magnitudes, deltas) + deltas
        return merge(self.base_weights, self.projections, factors, magnitudes)

    def frozen_head(self) -> tuple[np.ndarray, np.ndarray]:
        """The aligned head of the frozen backbone, over all classes so far: what the low-rank updates must beat."""
        return self.frozen.discriminant()

    def packet_bytes(self, task: int) -> int:
        """Size of the packet of a task, signed with one key: what `packet build` writes, but for the canary's few numbers."""
        update, before = self.updates[task - 1], self.states[task - 1]
        logits = np.zeros((canary.COUNT, len(self.states[task].live)), np.float32)
        contents = packet.Contents(
            lineage=self.lineage,
            begin=before.digest,
            updates=(update,),
            canary_seed=task,
            canary_logits=logits,
            encoding=self.config.method.encoding,
        )
        return len(packet.build(contents, signing.unsigned))

    def _read_rest(self, task: int) -> None:
        own = self.path / "tasks" / f"{task:03d}"
        if (own / METRICS).is_file():
            self.metrics.append(parse_json(atomic.read(own / METRICS), str(own / METRICS)))
        tensors, _ = _load(own / STATISTICS)
        try:
            self.frozen, self.plain = (
                _statistics(tensors, "frozen."),
                (tensors["plain.weight"], tensors["plain.bias"]),
            )
            self.statistics = _statistics(tensors, "") if "means" in tensors else None
        except KeyError as error:
            raise InputError(
                f"{own / STATISTICS} lacks {error}: the run was made by another version"
            ) from error


def _write_task(
    path: Path,
    update: TaskUpdate,
    statistics: FeatureStatistics | None,
    frozen: FeatureStatistics,
    plain: tuple[np.ndarray, np.ndarray],
    exact: Mapping[str, Factors],
    metrics: dict[str, Any] | None,
    digest: str = "",
) -> None:
    names = {
        "task": update.task,
        "name": update.name,
        "classes": update.classes,
        "retired": update.retired,
        "renamed": update.renamed,
        "deltas": update.deltas.tolist(),
        "digest": digest,
    }
    if (target := path / "tasks" / f"{update.task:03d}").exists():
        raise UsageError(
            f"{path} has learned task {update.task} since it was opened: open it again"
        )
    with atomic.new_folder(target) as new:
        _save(new / STATE, update.tensors(), {"task": dump_json(names).decode()})
        kept = {f"frozen.{name}": array for name, array in frozen.__dict__.items()}
        kept |= {"plain.weight": plain[0], "plain.bias": plain[1]}
        kept |= {f"{EXACT}{name}": array for name, array in factor_tensors(exact).items()}
        _save(new / STATISTICS, kept | (statistics.__dict__ if statistics is not None else {}), {})
        if metrics is not None:
            atomic.write(new / METRICS, _metrics_json(metrics))


def _metrics_json(metrics: dict[str, Any]) -> bytes:
    return json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n"


def _statistics(tensors: Mapping[str, np.ndarray], prefix: str) -> FeatureStatistics:
    return FeatureStatistics(
        *(tensors[f"{prefix}{name}"] for name in ("means", "scatter", "counts"))
    )


def _save(path: Path, tensors: Mapping[str, np.ndarray], facts: dict[str, str]) -> None:
    atomic.write(
        path,
        safetensors.numpy.save(
            {name: np.asarray(t, order="C") for name, t in tensors.items()}, metadata=facts
        ),
    )


def _read_task(
    run: Path, task: int, projections: list[str], encoding: str
) -> tuple[TaskUpdate, str]:
    path = run / "tasks" / f"{task:03d}" / STATE
    tensors, facts = _load(path)
    try:
        names = json.loads(facts["task"])
        update = TaskUpdate(
            names["task"],
            names["name"],
            tuple(names["classes"]),
            np.array(names["deltas"], np.float64),
            HeadUpdate.from_tensors(tensors),
            factors_from(tensors, projections, encoding=encoding),
            tuple(names["retired"]),
            tuple((row, name) for row, name in names["renamed"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the state of a task: {error!r}") from error
    return update, names["digest"]


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise verdict(error, InputError(f"{path} cannot be read: {error}")) from error

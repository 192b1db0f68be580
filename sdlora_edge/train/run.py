"""A run on disk: what the host keeps of each task, and nothing it could read a picture from.

    config.toml                  the resolved settings
    backbone.safetensors         W_0 and the rest of the frozen backbone: a run can be gone on with on any machine
    tasks/NNN/state.safetensors  task N as it is shipped (factors, head rows); names and magnitude deltas in its metadata
    tasks/NNN/statistics.safetensors   means and scatter of the features, where the head is aligned (never shipped)
    tasks/NNN/metrics.json       `correct` and `totals` of every task so far, their summary, source and timing

tasks/000 is the state before the first task: the base head, if there was a base session. runs/latest points to the newest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import nn

from .. import files
from ..canonical import dump_json, parse_json, tensors_digest
from ..device.preprocessing import Preprocessing
from ..errors import InputError, UsageError
from ..method import backbones
from ..method.head import FeatureStatistics
from ..method.sdlora import adapted_weights
from ..packet import ENCODING
from ..state import Factors, Projection, TaskState, TaskUpdate, advance, factors_from, lineage_id, merge
from . import config
from .config import TrainConfig

BACKBONE, STATE, STATISTICS, METRICS = "backbone.safetensors", "state.safetensors", "statistics.safetensors", "metrics.json"


@dataclass(eq=False)
class Run:
    """An opened run. states[t] is the state after task t (states[0] before the first); updates[t - 1] is task t as shipped."""

    path: Path
    config: TrainConfig
    backbone: nn.Module
    preprocessing: Preprocessing
    projections: tuple[Projection, ...]
    lineage: str
    states: list[TaskState]
    updates: list[TaskUpdate] = field(default_factory=list)
    statistics: FeatureStatistics | None = None
    """of all classes so far, under the newest weights; None where the head is not aligned"""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """metrics.json of every scored task: of task 0 too, where there was a base session"""

    @classmethod
    def create(
        cls,
        path: Path,
        settings: TrainConfig,
        backbone: nn.Module,
        preprocessing: Preprocessing,
        base: tuple[str, tuple[str, ...], np.ndarray, np.ndarray],
        statistics: FeatureStatistics | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Run:
        """Begin a run in the folder `path`. base: (name, classes, head weight float32 (C, features), head bias (C,))."""
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in backbone.state_dict().items()}
        name, classes, head_weight, head_bias = base
        with files.new_folder(path) as folder:
            files.write(folder / "config.toml", settings.to_toml().encode())
            facts = {"preprocessing": dump_json(preprocessing.__dict__).decode()}
            _save(folder / BACKBONE, weights, facts)
            update = TaskUpdate(
                0,
                name,
                classes,
                np.zeros(0),
                np.arange(len(classes), dtype=np.int32),
                head_weight.astype(np.float16),
                head_bias,
                {},
            )
            _write_task(folder, update, statistics, metrics)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run. Raises InputError where a file is missing or does not fit the others."""
        if not (path / "config.toml").is_file():
            raise InputError(f"{path} is not a run: no config.toml in it; make one with sdlora-edge train")
        settings = config.load(path / "config.toml")
        backbone, _ = backbones.create(settings.backbone, settings.image_size or None, None, pretrained=False)
        tensors, facts = _load(path / BACKBONE)
        try:
            preprocessing = Preprocessing.from_manifest(json.loads(facts["preprocessing"]))
            backbone.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
            projections = backbones.projections(backbone)
            base, _ = _read_task(path, 0, [])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{path / BACKBONE} does not fit {settings.backbone}: {error}") from error
        head_weight = base.head_weight.astype(np.float32)
        lineage = lineage_id(tensors_digest(tensors), projections, ENCODING, head_weight, base.head_bias)
        first = TaskState(0, base.name, lineage, base.classes, np.zeros(0), head_weight, base.head_bias, {})
        run = cls(path, settings, backbone, preprocessing, projections, lineage, [first])
        run._read_rest(0)
        while (path / "tasks" / f"{len(run.states):03d}").is_dir():
            update, digest = _read_task(path, len(run.states), [p.name for p in projections])
            run.follow(update)
            if run.states[-1].digest != digest:
                raise InputError(f"{path}: task {update.task} does not follow from the tasks before it")
            run._read_rest(update.task)
        return run

    def follow(self, update: TaskUpdate) -> None:
        """Take a finished task as the newest, in memory."""
        self.states.append(advance(self.states[-1], update))
        self.updates.append(update)

    def record(self, metrics: dict[str, Any]) -> None:
        """Write the newest task and its metrics: the folder appears whole or not at all."""
        self.metrics.append(metrics)
        _write_task(self.path, self.updates[-1], self.statistics, metrics, self.states[-1].digest)

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
        return merge(self.base_weights, self.projections, self.factors(task), self.states[task].magnitudes)

    @property
    def base_weights(self) -> dict[str, np.ndarray]:
        """W_0 of every adapted weight."""
        return adapted_weights(self.backbone, self.projections)

    def _read_rest(self, task: int) -> None:
        folder = self.path / "tasks" / f"{task:03d}"
        if (folder / METRICS).is_file():
            self.metrics.append(parse_json(files.read(folder / METRICS), str(folder / METRICS)))
        if (folder / STATISTICS).is_file():
            tensors, facts = _load(folder / STATISTICS)
            self.statistics = FeatureStatistics(tensors["means"], tensors["scatter"], int(facts["count"]))


def newest(root: Path = Path("runs")) -> Path:
    """The run that runs/latest points to. Raises InputError where there is none."""
    latest = root / "latest"
    if not latest.is_dir():
        raise InputError(f"no run named, and {latest} points to none: make one with sdlora-edge train, or name it")
    return latest.resolve()


def point_latest(path: Path) -> None:
    """Make `latest`, beside the run, point to it."""
    temporary = path.parent / ".latest.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.parent / "latest")


def _write_task(
    folder: Path, update: TaskUpdate, statistics: FeatureStatistics | None, metrics: dict[str, Any] | None, digest: str = ""
) -> None:
    names = {
        "task": update.task,
        "name": update.name,
        "classes": update.classes,
        "deltas": update.deltas.tolist(),
        "digest": digest,
    }
    with files.new_folder(folder / "tasks" / f"{update.task:03d}") as new:
        _save(new / STATE, update.tensors(), {"task": dump_json(names).decode()})
        if statistics is not None:
            _save(new / STATISTICS, {"means": statistics.means, "scatter": statistics.scatter}, {"count": str(statistics.count)})
        if metrics is not None:
            files.write(new / METRICS, json.dumps(metrics, indent=1, ensure_ascii=False).encode() + b"\n")


def _save(path: Path, tensors: Mapping[str, np.ndarray], facts: dict[str, str]) -> None:
    files.write(path, safetensors.numpy.save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata=facts))


def _read_task(folder: Path, task: int, projections: list[str]) -> tuple[TaskUpdate, str]:
    path = folder / "tasks" / f"{task:03d}" / STATE
    tensors, facts = _load(path)
    try:
        names = json.loads(facts["task"])
        update = TaskUpdate(
            names["task"],
            names["name"],
            tuple(names["classes"]),
            np.array(names["deltas"], np.float64),
            tensors["head.index"],
            tensors["head.weight"],
            tensors["head.bias"],
            factors_from(tensors, projections),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the state of a task: {error!r}") from error
    return update, names["digest"]


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error

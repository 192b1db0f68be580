"""What runs the model: one file per engine, each an `Engine`. Another package adds one by an entry point, named as the target
that the manifests of its bundles name (it makes these itself: `export` writes for the built-in targets):

[project.entry-points."sdlora_edge.engines"]
mytarget = "mypackage.engine:MyEngine"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, UsageError
from ...formats.bundle import HEAD_BIAS, HEAD_WEIGHT, Bundle
from ...shortage import verdict
from ...state import UNUSED, TaskState

GROUP = "sdlora_edge.engines"
BUILT_IN = {"onnx": "onnx_runtime:OnnxEngine", "executorch": "executorch_runtime:ExecutorchEngine"}
"""{target: module here, and class}"""
RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch"}
"""{target: the distribution that runs it}"""


class Engine(ABC):
    """A loaded model whose adapted weights and head can be replaced while it serves.

    bundle: opened, every file verified. threads: 0 leaves the number to the engine. workspace: a folder of the store, made by
    the engine if it needs one, for files of its own; whatever lies there can be made again from bundle and packets.
    """

    runs = True
    """False for one that only prepares weights for a program beside this one, which then has to prove them itself"""
    advice = ""
    """what to try if its canary fails on this machine, as an imperative"""

    @abstractmethod
    def __init__(self, bundle: Bundle, threads: int, workspace: Path) -> None:
        """Raises InputError where the model cannot be loaded."""

    @abstractmethod
    def load(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Take float32 weights and head into the engine's own memory; the result is passed to `run`, old ones stay valid.

        Each weight is computed when it is asked for: take one after the other, and hold none of them twice.
        """

    @abstractmethod
    def run(self, loaded: Any, inputs: np.ndarray) -> np.ndarray:
        """float32 (N, 3, size, size) to logits, float32 (N, classes). Called by several threads at once."""

    @classmethod
    def without_running(cls, bundle: Bundle, workspace: Path) -> Engine:
        """The same engine where its runtime is not installed. Raises UsageError where nothing could be done without it."""
        raise UsageError(
            f"target {bundle.manifest.target} has no use for --unproved: its updates are proved on this device"
        )

    def published(self, loaded: Any, state: TaskState) -> bool:
        """Whether other programs know of this generation already: then `publish` has nothing to do, and needs no lock."""
        return type(self).publish is Engine.publish

    def require_publishing(self) -> None:  # noqa: B027
        """Asked before an update is built. Raises StorageError if `publish` could not write."""

    def publish(self, loaded: Any, state: TaskState) -> None:  # noqa: B027 (most have nothing to do)
        """Let other programs know of the generation in force now. Called again after a power cut. Raises StorageError."""


def open_engine(bundle: Bundle, threads: int, workspace: Path, unproved: bool = False) -> Engine:
    """The engine for the bundle's target; `unproved`: without its runtime. Raises InputError where none is installed."""
    target = bundle.manifest.target
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if target in BUILT_IN:
        module, name = BUILT_IN[target].split(":")
        found: type[Engine] = getattr(import_module(f".{module}", __name__), name)
    elif target in others:
        try:
            found = others[target].load()
        except Exception as error:  # whatever another package does when it is imported
            raise verdict(
                error, InputError(f"the engine for target {target!r} cannot be loaded: {error}")
            ) from error
    else:
        raise InputError(
            f"no engine for target {target!r}: this device has {', '.join(sorted({*BUILT_IN, *others}))}"
        )
    return (
        found.without_running(bundle, workspace) if unproved else found(bundle, threads, workspace)
    )


def with_room(name: str, weight: np.ndarray, capacity: int) -> np.ndarray:
    """The same weight; a head's with `capacity` rows: those beyond the classes can never win. As it is where capacity is 0."""
    if not capacity or name not in (HEAD_WEIGHT, HEAD_BIAS):
        return weight
    rows = [(0, capacity - len(weight)), *[(0, 0)] * (weight.ndim - 1)]
    return np.pad(weight, rows, constant_values=UNUSED if name == HEAD_BIAS else 0)

"""What runs the model: one module for each engine.

Another package adds an engine by an entry point. Its name is the target that the package's bundles
name in their manifests (`export` writes bundles for the built-in targets only):

[project.entry-points."sdlora_edge.engines"]
mytarget = "mypackage.engine:MyEngine"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import InputError, UsageError
from ...formats.bundle import HEAD_BIAS, HEAD_WEIGHT, Bundle
from ...inputs.modality import Inputs
from ...shortage import verdict
from ...state import UNUSED, TaskState

GROUP = "sdlora_edge.engines"
BUILT_IN = {"onnx": "onnx_runtime:OnnxEngine", "executorch": "executorch_runtime:ExecutorchEngine"}
"""{target: module here, and class}"""
RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch"}
"""{target: the distribution that runs it}"""


class Outputs(NamedTuple):
    """What a model computes.

    Attributes:
        logits: float32 (N, rows). A row for each class ever known: a retired one has the logit
            UNUSED, or near it, and the device leaves it out.
        features: float32 (N, features), what the head sees, for the unknown score; None if the
            model has no such output.
    """

    logits: np.ndarray
    features: np.ndarray | None = None


class Engine(ABC):
    """A loaded model whose adapted weights and head can be replaced while it serves.

    The contract for engines of other packages.

    A device makes one engine for each time that it opens a store. Then:

    1. `load` takes the weights of a generation; its result stays valid until the device drops it.
       With double buffering, two are alive at a time. What it holds, files included, is freed with
       it.
    2. `outputs` computes with it. The device compares the canary's logits with the host's; if they
       differ, the result of `load` is dropped and nothing else happens.
    3. After the commit, `publish` tells other programs, under a lock that one process holds at a
       time. It is called again when a store is opened and `published` is False, for example after a
       power cut between the commit and `publish`. An engine that serves this process alone
       overrides neither.

    Errors: raise InputError for a model that cannot be loaded, StorageError for a file that cannot
    be written. MemoryError, and errors of a runtime that say memory or disk ran out
    (`shortage.verdict`), are reported as ResourceError by the device.

    Args:
        bundle: Opened, every file verified.
        threads: Threads to compute with; 0 leaves the number to the engine.
        workspace: A folder of the store for the engine's own files; the engine makes it if it needs
            it. Everything in it can be made again from bundle and packets.
    """

    runs = True
    """False for an engine that only prepares weights for another program, which must then try the
    canary itself."""
    advice = ""
    """What to try if the canary fails on this machine, as an imperative."""
    takes_provider = False
    """Whether `__init__` takes a fourth argument, `provider`: the name of what computes, "" for the
    machine's own choice."""

    @abstractmethod
    def __init__(self, bundle: Bundle, threads: int, workspace: Path) -> None:
        """Raises InputError if the model cannot be loaded."""

    @abstractmethod
    def load(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Take the weights of a generation into the engine's own memory.

        Args:
            weights: {tensor: float32}, adapted weights and head. Each is computed when it is read:
                read each one once, one after the other, and keep no second copy.

        Returns:
            What `outputs` gets as `loaded`. Earlier results stay valid.
        """

    @abstractmethod
    def outputs(self, loaded: Any, inputs: Inputs) -> Outputs:
        """Compute with N preprocessed items.

        Several threads call it at once.

        Args:
            loaded: What `load` returned.
            inputs: By the names of the model's inputs: of images `pictures`, float32
                (N, 3, size, size); of texts `input_ids` and `attention_mask`, int64 (N, tokens).
        """

    def run(self, loaded: Any, inputs: Inputs) -> np.ndarray:
        """The logits of `outputs` alone."""
        return self.outputs(loaded, inputs).logits

    @classmethod
    def without_running(cls, bundle: Bundle, workspace: Path) -> Engine:
        """The engine without its runtime, for `--unproved`.

        Raises UsageError if the engine can do nothing without it.
        """
        raise UsageError(
            f"target {bundle.manifest.target} has no use for --unproved, "
            "because this device proves its updates: leave the option out"
        )

    def published(self, loaded: Any, state: TaskState) -> bool:
        """Whether other programs know of this generation, so that `publish` has nothing to do.

        Takes no lock.
        """
        return type(self).publish is Engine.publish

    def require_publishing(self) -> None:  # noqa: B027
        """Asked before an update is built. Raises StorageError if `publish` could not write."""

    def publish(self, loaded: Any, state: TaskState) -> None:  # noqa: B027
        """Tell other programs which generation is in force.

        A power cut at any point must leave them the generation before, or this one: write new
        files, sync them, then switch by one rename.

        Args:
            loaded: What `load` returned for it.
            state: Its task state: digest, task and class names.

        Raises:
            StorageError: It cannot be written. The update is in force all the same.
        """


def open_engine(
    bundle: Bundle, threads: int, workspace: Path, unproved: bool = False, provider: str = ""
) -> Engine:
    """The engine for a bundle's target.

    Args:
        bundle: An opened bundle.
        threads: As for `Engine`.
        workspace: As for `Engine`.
        unproved: Without its runtime (`Engine.without_running`).
        provider: As for `Engine.takes_provider`.

    Raises:
        InputError: No engine is installed for the target, or it cannot be loaded.
        UsageError: `unproved`, and the engine can do nothing without its runtime; or the engine
            takes no provider.
    """
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
            f"no engine for target {target!r}: this device has "
            f"{', '.join(sorted({*BUILT_IN, *others}))}; "
            "install the package of that engine, or export a bundle for one of these"
        )
    if provider and not found.takes_provider:
        raise UsageError(
            f"target {target} has no provider {provider}: leave --provider out, "
            "or use a bundle with target onnx"
        )
    if unproved:
        return found.without_running(bundle, workspace)
    chosen: Any = {"provider": provider} if provider else {}
    return found(bundle, threads, workspace, **chosen)


def with_room(name: str, weight: np.ndarray, capacity: int) -> np.ndarray:
    """The same weight.

    A tensor of the head gets `capacity` rows; those without a class can never win. 0 adds no rows.
    """
    if not capacity or name not in (HEAD_WEIGHT, HEAD_BIAS):
        return weight
    rows = [(0, capacity - len(weight)), *[(0, 0)] * (weight.ndim - 1)]
    return np.pad(weight, rows, constant_values=UNUSED if name == HEAD_BIAS else 0)

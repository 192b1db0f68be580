"""What runs the model: one file per engine, each an `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ...bundle import Bundle
from ...errors import InputError


class Engine(Protocol):
    """A loaded model whose adapted weights and head can be replaced while it serves."""

    def load(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Take float32 weights into the engine's own memory; the result is passed to `run`, old ones stay valid."""

    def run(self, loaded: Any, inputs: np.ndarray) -> np.ndarray:
        """float32 (N, 3, size, size) to logits, float32 (N, classes)."""


def open_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """The engine for the bundle's target; `threads` 0 leaves the number to the engine. Raises InputError."""
    from .onnx import OnnxEngine

    engines: dict[str, Callable[[Bundle, int], Engine]] = {"onnx": OnnxEngine}
    if bundle.manifest.target not in engines:
        raise InputError(f"no engine for target {bundle.manifest.target!r}: this version knows {', '.join(engines)}")
    return engines[bundle.manifest.target](bundle, threads)

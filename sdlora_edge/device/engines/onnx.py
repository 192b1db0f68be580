"""ONNX Runtime: one session for ever; every update only feeds other values for the overridable initializers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from ...bundle import MODELS, Bundle
from ...errors import InputError

(MODEL,) = MODELS["onnx"]
ERROR_LEVEL = 3  # below it ONNX Runtime warns once per overridable initializer


class OnnxEngine:
    def __init__(self, bundle: Bundle, threads: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_LEVEL
        options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(bundle.path / MODEL), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise InputError(f"{bundle.path / MODEL}: ONNX Runtime cannot load it: {error}") from error
        self._input = self._session.get_inputs()[0].name
        self._overridable = {value.name for value in self._session.get_overridable_initializers()}
        self._outputs = [self._session.get_outputs()[0].name]

    def load(self, weights: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        if unknown := set(weights) - self._overridable:
            raise InputError(f"{MODEL} has no overridable initializer {', '.join(sorted(unknown))}: export it again")
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}

    def run(self, loaded: dict[str, ort.OrtValue], inputs: np.ndarray) -> np.ndarray:
        feed = {self._input: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs)), **loaded}
        return np.asarray(self._session.run_with_ort_values(self._outputs, feed)[0].numpy())

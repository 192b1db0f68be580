"""ONNX Runtime. Where weights are inputs, one session serves for ever and an update feeds other values; where they are constants,
an update makes a session beside the old one, with the new values in place of those in the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from ...bundle import CONSTANTS, DTYPES, HEAD_BIAS, Bundle
from ...errors import InputError
from ...shortage import verdict
from . import Engine, with_room

MODEL = "model.onnx"
ERROR_LEVEL = 3  # below it ONNX Runtime warns once per overridable initializer


class _Loaded(NamedTuple):
    session: ort.InferenceSession
    feed: dict[str, ort.OrtValue]
    """what the session is fed beside the pictures"""
    classes: int


class OnnxEngine(Engine):
    def __init__(self, bundle: Bundle, threads: int, workspace: Path) -> None:
        self._path = bundle.path / MODEL
        self._threads = threads
        self._capacity = bundle.manifest.capacity
        self._dtypes = {name: DTYPES[entry["dtype"]] for name, entry in bundle.manifest.weights.items()}
        self._session = None if bundle.manifest.weights_as == CONSTANTS else self._open({})

    def load(self, weights: Mapping[str, np.ndarray]) -> _Loaded:
        values = {  # neither step copies an array that is of the right kind already: an OrtValue refers to numpy's memory
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(with_room(name, array, self._capacity), self._dtypes[name]))
            for name, array in weights.items()
        }
        session, feed = (self._session, values) if self._session else (self._open(values), {})
        return _Loaded(session, feed, len(weights[HEAD_BIAS]))

    def run(self, loaded: _Loaded, inputs: np.ndarray) -> np.ndarray:
        feed = {"pictures": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs)), **loaded.feed}
        logits = np.asarray(loaded.session.run_with_ort_values(["logits"], feed)[0].numpy())
        return logits[:, : loaded.classes]

    def _open(self, constants: dict[str, ort.OrtValue]) -> ort.InferenceSession:
        """A session with these values in place of the file's own; shapes are checked by ONNX Runtime."""
        options = ort.SessionOptions()
        options.log_severity_level = ERROR_LEVEL
        options.intra_op_num_threads = self._threads
        # int8 weights are unpacked once, when the session opens: else activations would be rounded to int8 as well
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if constants:
            options.add_external_initializers(list(constants), list(constants.values()))
        try:
            session = ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise verdict(error, InputError(f"{self._path}: ONNX Runtime cannot load it: {error}")) from error
        overridable = {value.name for value in session.get_overridable_initializers()}
        if not constants and (unknown := set(self._dtypes) - overridable):
            raise InputError(f"{MODEL} has no overridable initializer {', '.join(sorted(unknown))}: export it again")
        return session

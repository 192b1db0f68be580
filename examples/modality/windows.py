"""A kind of input of your own: windows of a sensor, such as the vibration of a motor.

A dataset is an .npz file with `windows`, float32 (N, steps, channels), and `labels`, (N,). The
backbone is called window:STEPSxCHANNELS, such as window:64x3.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdlora_edge.errors import InputError
from sdlora_edge.inputs.modality import KIND, Preparation


@dataclass(frozen=True)
class Windows(Preparation):
    """What devices need: no torch here."""

    kind, noun, host = "window", "window", "windows_host:WindowModality"
    axes, dtype = {"windows": ("batch",)}, np.dtype(np.float32)
    steps: int
    channels: int

    @property
    def shape(self):
        return self.steps, self.channels

    def item(self, raw, limit=None):
        data = io.BytesIO(raw) if isinstance(raw, bytes) else raw
        try:
            found = data if isinstance(data, np.ndarray) else np.load(data, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{raw} cannot be read as a window: {error}") from error
        if found.shape != self.shape or not np.isfinite(found).all():
            raise InputError(f"a window {found.shape} does not fit: send {self.shape}")
        return found.astype(np.float32)

    def arrays(self, items):
        return {"windows": items}

    def blank(self, each, seed):
        random, shape = np.random.RandomState(seed), (each, *self.shape)
        return {"silence": np.zeros(shape, np.float32), "noise": random.randn(*shape).astype("f4")}

    def to_manifest(self):
        return {KIND: self.kind, "steps": self.steps, "channels": self.channels}

    @classmethod
    def from_manifest(cls, value, folder):
        try:
            return cls(int(value["steps"]), int(value["channels"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the manifest's preprocessing is malformed: {error}") from error


def read_windows(path):
    """[(name, label, opener)] of a dataset."""
    with np.load(path, allow_pickle=False) as data:
        pairs = zip(data["windows"], data["labels"], strict=True)
        return [
            (f"{path}:{i}", str(label), partial(np.array, w)) for i, (w, label) in enumerate(pairs)
        ]

"""What web/test compares a JavaScript device with: bundles, packets, and what Python answers.

    python tests/web_fixture.py FOLDER

FOLDER gets packets/, a bundle `export --for web` of each precision, and expected.json.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL, make_fleet
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.formats.bundle import Bundle
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.inputs import canary
from sdlora_edge.state import TaskState, extended
from sdlora_edge.train.run import Run

PRECISIONS = ("fp32", "fp16", "int8")
IMAGES = 4


def main(folder: Path) -> None:
    fleet = make_fleet(folder / "host", SMALL)
    run, trust = Run.open(fleet.run), [str(fleet.key.with_suffix(".pub"))]
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 20, 24, 3), np.uint8)
    inputs = canary.inputs(3, run.preprocessing, IMAGES)
    expected: dict[str, Any] = {
        "packets": [str(packet.relative_to(folder)) for packet in fleet.packets],
        "images": [_text(image) for image in images],
        "inputs": _text(inputs["pictures"]),
        "states": {},
    }
    for precision in PRECISIONS:
        options = ExportOptions(precision=precision, runs_in="web", min_agreement=0.9)
        export_bundle(run, folder / precision, 0, trust, options)
        device = Device.init(folder / precision, folder / "host" / precision)
        states = [_state(device, images, inputs)]
        for packet in fleet.packets:
            device.apply(packet)
            states.append(_state(device, images, inputs))
        expected["states"][precision] = states
    (folder / "expected.json").write_text(json.dumps(expected))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _state(device: Device, images: np.ndarray, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    state, weights = device.current()
    factors = [*device.bundle.factors, *device._live.factors]
    names = [name for name in weights if not name.startswith("head.")]
    return {
        "state": state.digest,
        "logits": device.logits(inputs).tolist(),
        "answers": [p.to_dict() for p in device.predict(list(images), top=3)],
        "merged": {name: sha256(weights[name].tobytes()) for name in names},
        "fused": {n: sha256(_fused(n, device.bundle, state, factors).tobytes()) for n in names},
    }


def _fused(name: str, bundle: Bundle, state: TaskState, factors: list[Any]) -> np.ndarray:
    """A merged weight by fused multiply-adds, first direction to last, whatever BLAS does here."""
    merged = bundle.weights[name].copy()
    away = state.magnitudes - extended(bundle.state.magnitudes, state.magnitudes)
    for i, p in enumerate(bundle.manifest.projections):
        if p.tensor != name:
            continue
        sums = np.zeros((p.stop - p.start, p.columns), np.float32)
        for k, task in enumerate(factors):
            c = np.float32(away[k] if away.ndim == 1 else away[k, i])
            if p.name in task and c:
                B = task[p.name].B.astype(np.float32) * c
                for column, row in zip(B.T, task[p.name].A.astype(np.float32)):
                    sums = _fma(column[:, None], row, sums)
        merged[p.start : p.stop] += sums
    return merged


def _fma(b: np.ndarray, a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """b a + c in one rounding: float32. The sum of float64 is corrected where it made a tie."""
    product, c = b.astype(np.float64) * a, c.astype(np.float64)
    wide = product + c
    near = wide.astype(np.float32).astype(np.float64)
    other = 2 * wide - near
    tie = (near != wide) & (other.astype(np.float32) == other)
    rest = wide - product
    lost = (product - (wide - rest)) + (c - rest)
    near = np.where(tie & (lost > 0), np.maximum(near, other), near)
    near = np.where(tie & (lost < 0), np.minimum(near, other), near)
    return near.astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

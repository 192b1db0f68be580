"""The whole loop after training: keys, export, packets, a device; host and device compared after every packet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import signing
from ..device.runtime import Device
from ..train import data
from ..train.run import Run
from ..train.score import test_pictures_by_class
from .bundles import export_bundle
from .packets import build_packets
from .parity import BATCH, compare, host_logits


def ship(run: Run, out: Path, task: int) -> dict[str, Any]:
    """Export the state after `task`, apply every later task to a device as a packet, and compare over ALL test pictures.

    The device gets the pictures as a camera would hand them over and prepares them itself. Returns {"tasks": [{"task",
    "host_accuracy", "device_accuracy", "packet_bytes", "apply_ms", "max_logit_difference", "same_top", "pictures"}],
    "model_bytes"}; the first entry is the bundle itself, with packet_bytes and apply_ms 0.
    """
    private, public = signing.new_key("loop", out / "keys")
    exported = export_bundle(run, out / "bundle", task, [str(public)])
    packets = build_packets(run.path, out / "bundle", private, out=out / "packets")
    device = Device.init(out / "bundle", out / "store")
    rows = [_compare(run, device, task) | {"packet_bytes": 0, "apply_ms": 0.0}]
    for built in packets:
        applied = device.apply(built["file"])
        rows.append(_compare(run, device, built["task"]) | {"packet_bytes": built["bytes"], "apply_ms": applied["apply_ms"]})
    return {"tasks": rows, "model_bytes": exported["model_bytes"]}


def _compare(run: Run, device: Device, task: int) -> dict[str, Any]:
    by_class = test_pictures_by_class(run, task)
    classes = run.states[task].classes
    decoded = data.decode(by_class, [c for c in classes if c in by_class], run.preprocessing, need=False)
    inputs = run.preprocessing.normalise(decoded.pixels)
    reference = host_logits(run, task, inputs)
    pictures = [p.open() for c in classes if c in by_class for p in by_class[c]]
    predictions = device.predict(pictures)
    truth = np.array([i for i, c in enumerate(classes) if c in by_class for _ in by_class[c]])
    answers = np.array([classes.index(p.top[0][0]) for p in predictions])
    parity = compare(np.concatenate([device.logits(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]), reference)
    return {
        "task": task,
        "host_accuracy": float((reference.argmax(axis=1) == truth).mean()),
        "device_accuracy": float((answers == truth).mean()),
        "max_logit_difference": parity.difference,
        "same_top": int((answers == reference.argmax(axis=1)).sum()),
        "pictures": len(truth),
    }

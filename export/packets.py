"""Packets of a run, each proved on a scratch device before it is written: no device gets one that it would refuse."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .. import files, packet, signing
from ..bundle import open_bundle
from ..device import canary
from ..device.runtime import Device
from ..errors import NotForThisDevice, NothingToDo, UsageError
from ..train.run import Run
from .parity import host_logits


def build_packets(
    run_path: Path, bundle_path: Path, key: Path, task: int | None = None, out: Path | None = None
) -> list[dict[str, Any]]:
    """Sign a packet for every task after the bundle's, or for `task` alone, into `out` (default: packets/ in the run).

    Raises NothingToDo where the bundle knows every task, NotForThisDevice where bundle and run are of different lineages,
    UsageError for a task the bundle knows already or the run has not, TrustError where the bundle does not trust the key,
    HealthError where a device would not compute what this host computes.
    """
    run, bundle, signer = Run.open(run_path), open_bundle(bundle_path), signing.load_signer(key)
    first, last = bundle.manifest.task + 1, len(run.updates)
    if bundle.manifest.lineage != run.lineage or (first <= last + 1 and run.states[first - 1].digest != bundle.manifest.state):
        raise NotForThisDevice(f"{bundle_path} was not exported from {run_path}: name the bundle of this run")
    if task is not None and not first <= task <= last:
        raise UsageError(f"--task {task}: {bundle_path} knows the tasks up to {first - 1}, and {run_path} has {last}")
    if first > last:
        raise NothingToDo(f"{bundle_path} knows all {last} tasks of {run_path}: nothing to ship")
    out = out or run_path / "packets"
    built = []
    with tempfile.TemporaryDirectory() as scratch:
        device = Device.init(bundle_path, Path(scratch) / "store")
        for number in range(first, (task or last) + 1):
            update, before = run.updates[number - 1], run.states[number - 1]
            logits = host_logits(run, number, canary.inputs(number, run.preprocessing))
            data = packet.build(update, before, run.lineage, number, logits, lambda payload: signing.sign(payload, [signer]))
            name = f"{number:03d}-{run.states[number].digest[:8]}{packet.SUFFIX}"
            proof = Path(scratch) / name
            proof.write_bytes(data)
            status = device.apply(proof)
            if task in (None, number):
                files.write(out / name, data)
                built.append(
                    {
                        "file": str(out / name),
                        "task": number,
                        "name": update.name,
                        "classes": list(update.classes),
                        "bytes": len(data),
                        "canary_difference": status["canary_difference"],
                    }
                )
    return built

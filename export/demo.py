"""What `sdlora-edge demo` and `make demo` do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..train.config import resolve

if TYPE_CHECKING:
    from ..train.trainer import Report


def run_demo(out: Path, report: Report) -> dict[str, Any]:
    """Train the embedded default, export its base session, ship its three tasks, and score host and device.

    `out` is made anew. Raises UsageError where it holds something that no demo left there.
    """
    marker = out / ".sdlora-edge-demo"
    if out.exists() and not marker.exists():
        raise UsageError(f"{out} exists and was not made by a demo: choose another --out")
    from ..train.trainer import train  # torch, which takes seconds, comes after the check
    from .loop import ship

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()
    run = train(resolve(None, {}), out / "runs" / "demo", report)
    shipped = ship(run, out, 0)
    last = shipped["tasks"][-1]
    return {
        "host_accuracy": last["host_accuracy"],
        "device_accuracy": last["device_accuracy"],
        "packets": len(shipped["tasks"]) - 1,
        "packet_bytes": sum(row["packet_bytes"] for row in shipped["tasks"]),
        "model_bytes": shipped["model_bytes"],
    }

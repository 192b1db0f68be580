"""What the host answers for images that the user chose: a device compares its own answers with them (`selftest.parity`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..formats.canonical import dump_json, sha256
from ..inputs.limits import MAX_PIXELS
from ..selftest.checks import EXPECTED, EXPECTED_FORMAT
from ..storage import atomic
from ..train.run import Run
from .parity import host_logits
from .requests import expectation


def record(run: Run, images: Path, out: Path, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """A new folder `out`: a copy of every image in the folder `images`, and torch's logits for them in every state of the run.

    States go by their digest, so any bundle of the run finds its own. Raises InputError where there is no image, or one
    cannot be read; UsageError where `out` exists.
    """
    paths = expectation(run.path, images, out)
    inputs = run.preprocessing.normalise(
        np.stack([run.preprocessing.pixels(path, max_pixels) for path in paths])
    )
    states = {
        state.digest: {"task": state.task, "logits": host_logits(run, state.task, inputs).tolist()}
        for state in run.states
        if state.classes
    }
    with atomic.new_folder(out) as folder:
        digests = {}
        for path in paths:
            data = atomic.read(path)
            atomic.write(folder / path.name, data)
            digests[path.name] = sha256(data)
        expected = {
            "format": EXPECTED_FORMAT,
            "lineage": run.lineage,
            "images": digests,
            "states": states,
        }
        atomic.write(folder / EXPECTED, dump_json(expected))
    return {"expected": str(out), "images": len(paths), "states": len(states)}

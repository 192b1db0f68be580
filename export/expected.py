"""What the host answers for pictures that the user chose: a device compares its own answers with them (`selftest.parity`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..canonical import dump_json, sha256
from ..device.selftest import EXPECTED, EXPECTED_FORMAT
from ..train.run import Run
from .check import expectation
from .parity import host_logits


def record(run: Run, pictures: Path, out: Path) -> dict[str, Any]:
    """A new folder `out`: a copy of every picture in the folder `pictures`, and torch's logits for them in every state of the run.

    States go by their digest, so any bundle of the run finds its own. Raises InputError where there is no picture, or one
    cannot be read; UsageError where `out` exists.
    """
    paths = expectation(run.path, pictures, out)
    inputs = run.preprocessing.normalise(np.stack([run.preprocessing.pixels(path) for path in paths]))
    states = {
        state.digest: {"task": state.task, "logits": host_logits(run, state.task, inputs).tolist()}
        for state in run.states
        if state.classes
    }
    with files.new_folder(out) as folder:
        digests = {}
        for path in paths:
            data = files.read(path)
            files.write(folder / path.name, data)
            digests[path.name] = sha256(data)
        expected = {"format": EXPECTED_FORMAT, "lineage": run.lineage, "pictures": digests, "states": states}
        files.write(folder / EXPECTED, dump_json(expected))
    return {"expected": str(out), "pictures": len(paths), "states": len(states)}

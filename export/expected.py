"""What the host answers for images that the user chose.

A device compares its own answers with them (`selftest.checks.parity`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..formats.canonical import dump_json, sha256
from ..inputs.sizes import MAX_PIXELS
from ..progress import stage
from ..results import Result
from ..selftest.kit import EXPECTED, EXPECTED_FORMAT
from ..storage import atomic
from ..train.run import Run
from .parity import host_logits
from .requests import expectation


@dataclass(frozen=True)
class Recorded(Result):
    """expected: the new folder. images, states: how many it holds."""

    expected: Path
    images: int
    states: int


def record(run: Run, images: Path, out: Path, max_pixels: int = MAX_PIXELS) -> Recorded:
    """Copy images into a new folder, and record torch's logits for them in every state of a run.

    States are named by their digest, so any bundle of the run finds its own.

    Args:
        run: the run.
        images: a folder with images directly inside.
        out: the new folder.
        max_pixels: an image with more is refused.

    Raises:
        InputError: there is no image, or one cannot be read.
        UsageError: `out` exists.
    """
    paths = expectation(run.path, images, out)
    prepare = run.preprocessing
    inputs = prepare.arrays(np.stack([prepare.item(path, max_pixels) for path in paths]))
    with stage("computing what the host answers"):
        states = {
            state.digest: {
                "task": state.task,
                "logits": host_logits(run, state.task, inputs).tolist(),
            }
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
    return Recorded(out, len(paths), len(states))

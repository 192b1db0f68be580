"""The packets of a run, with a temperature and an unknown score that the test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import Fleet, inputs
from sdlora_edge.export.parity import host_logits

from sdlora_edge.device import Device
from sdlora_edge.formats import packet, signing
from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.inputs import canary
from sdlora_edge.state import TaskState, advance
from sdlora_edge.train.run import Run


def telling(
    state: TaskState, threshold: float | None, temperature: float, away: bool = False
) -> Confidence:
    """A score of two components, with numbers of the state's own. away: it needs features too."""
    random, k = np.random.default_rng(state.task), 2
    return Confidence(
        np.array([temperature], np.float32),
        random.integers(-127, 128, (k, len(state.live))).astype(np.int8),
        np.full(k, 0.001, np.float32),
        random.normal(0, 0.1, k).astype(np.float32),
        *(
            np.abs(random.normal(0, 0.5, (2, state.head_weight.shape[1]))).astype(np.float16)
            if away
            else np.zeros((2, 0), np.float16)
        ),
        np.array([] if threshold is None else [threshold], np.float32),
    )


def packets(
    run: Run,
    fleet: Fleet,
    out: Path,
    values: Sequence[tuple[float | None, float]],
    away: bool = False,
) -> list[Path]:
    """The run's packets, with (threshold, temperature) of each task. away: as in `telling`."""
    signers, state, files = signing.signers_of([fleet.key]), run.states[0], []
    out.mkdir()
    for update, (threshold, temperature) in zip(run.updates, values, strict=False):
        begin, plain = state.digest, advance(state, update)
        own = telling(plain, threshold, temperature, away)
        update = replace(update, head=replace(update.head, confidence=own))
        state = advance(state, update)
        seen = canary.inputs(state.task, run.preprocessing)
        contents = packet.Contents(
            lineage=run.lineage,
            begin=begin,
            updates=(update,),
            canary_seed=state.task,
            canary_logits=host_logits(run, state.task, seen),
        )
        files.append(out / f"{state.task}.sdlora")
        files[-1].write_bytes(packet.build(contents, lambda data: signing.sign(data, signers)))
    return files


def between(run: Run, device: Device, task: int) -> float:
    """A threshold that some of the images reach, and some do not."""
    state = run.states[task]
    scores = telling(state, None, 1.0).scores(host_logits(run, task, inputs(device)))
    return float(np.float32(np.sort(scores)[[2, 3]].mean()))

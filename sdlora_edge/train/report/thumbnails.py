"""Confused test images for a report. They are scored anew, so this part alone needs torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...progress import stage
from ...results import Result
from ..items import Item
from .summary import Confusion

if TYPE_CHECKING:
    from ..evaluator import Evaluator

PAIRS, IMAGES, SIDE, CHARACTERS = 6, 4, 64, 200
"""pairs of classes that are shown, images of each pair, pixels of an image's side, characters of a
text"""


@dataclass(frozen=True)
class Shot(Result):
    """An image as a data URI, or a text, and the name of its file."""

    name: str
    uri: str
    text: str = ""


@dataclass(frozen=True)
class Confused(Result):
    """Some images of one class that the newest state takes for another class."""

    truth: str
    predicted: str
    images: tuple[Shot, ...]


def confused(path: Path, confusions: Sequence[Confusion]) -> tuple[Confused, ...]:
    """Find images of the most frequent confusions, as the model sees them.

    The images are read from the run's sources and scored with its newest state. Pairs whose
    images can no longer be read are left out.
    """
    from ..evaluator import Evaluator  # torch
    from ..run import Run
    from ..score import test_images_by_class

    with stage("finding confused images"):
        run = Run.open(path)
        files = test_images_by_class(run, run.states[-1].task)
        evaluator = Evaluator.at(run, run.states[-1].task)
        wanted = confusions[:PAIRS]
        guesses = {
            truth: _guesses(evaluator, truth, files.get(truth, []))
            for truth in dict.fromkeys(c.truth for c in wanted)
        }
    pairs = []
    for c in wanted:
        own = [(name, pixels) for name, pixels, guess in guesses[c.truth] if guess == c.predicted]
        if own:
            seen = run.preprocessing.seen
            shots = tuple(_shot(name, seen(item)) for name, item in own[:IMAGES])
            pairs.append(Confused(c.truth, c.predicted, shots))
    return tuple(pairs)


def _guesses(
    evaluator: Evaluator, label: str, images: Sequence[Item]
) -> list[tuple[str, np.ndarray, str]]:
    """(name, pixels, answer) of the readable images of a class, under the newest state."""
    from ...method.merged import logits_of
    from .. import splits

    run, state = evaluator.run, evaluator.run.states[-1]
    decoded = [
        (p.name, splits.decode({label: [p]}, [label], run.preprocessing, need=False).pixels)
        for p in images
    ]
    readable = [(name, pixels[0]) for name, pixels in decoded if len(pixels)]
    if not readable:
        return []
    pixels = np.stack([pixels for _, pixels in readable])
    seen = evaluator.features_of(run.preprocessing.arrays(pixels))
    guess = logits_of(state, seen).argmax(axis=1)
    return [(name, pixels, state.classes[g] or "") for (name, pixels), g in zip(readable, guess)]


def _shot(name: str, seen: np.ndarray | str) -> Shot:
    return (
        Shot(name, "", seen[:CHARACTERS]) if isinstance(seen, str) else Shot(name, _data_uri(seen))
    )


def _data_uri(pixels: np.ndarray) -> str:
    """uint8 (size, size, 3) to a JPEG of SIDE x SIDE pixels as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE)).save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

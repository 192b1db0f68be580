"""From images to answers, batch by batch: what is decoded, computed and kept at a time does not grow with their number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np

from ..errors import InputError, ResourceError
from ..inputs.image import ImageLike, Preprocessing
from .gate import let_go

BATCH = 8
"""images. 32 at a time take 600 MB more with a ViT-B, and are hardly faster"""

Source = Union[ImageLike, Callable[[], ImageLike]]
"""An image, or what reads it when its turn comes"""


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first, as (class name, probability).

    generation: which model answered; 0 for what is left of a damaged one.
    """

    top: tuple[tuple[str, float], ...]
    generation: int


def prepared(
    images: Iterable[Source], prepare: Preprocessing, size: int, max_pixels: int
) -> Iterator[list[np.ndarray | InputError | ResourceError]]:
    """Batches of uint8 (size, size, 3); the error of an image that cannot be read, or that memory ran out for, in its place."""

    def one(image: Source) -> np.ndarray | InputError | ResourceError:
        try:
            return prepare.pixels(image() if callable(image) else image, max_pixels)
        except (InputError, ResourceError) as error:
            let_go(error)  # the next image needs the memory
            return error

    rest = iter(images)
    while batch := list(itertools.islice(rest, size)):
        yield [one(image) for image in batch]


def best(
    logits: np.ndarray, classes: Sequence[str | None], generation: int, top: int
) -> Iterator[Prediction]:
    """logits: float32 (N, rows). A row without a class (retired) is never answered."""
    live = [(row, name) for row, name in enumerate(classes) if name is not None]
    logits = logits[:, [row for row, _ in live]]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    for row in scores:
        order = np.argsort(-row, kind="stable")[:top]
        yield Prediction(tuple((live[i][1], float(row[i])) for i in order), generation)

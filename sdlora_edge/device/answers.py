"""From images to answers, batch by batch: memory does not grow with the number of images."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Union, overload

import numpy as np

from ..errors import InputError, NothingToDo, ResourceError, UsageError
from ..inputs.image import ImageLike, Preprocessing, one_or_many, require_image
from ..inputs.sizes import MAX_PIXELS
from ..results import Result
from ..shortage import noticed
from .engines import Engine
from .gate import let_go
from .generation import Live

BATCH = 8
"""images. Batches of 32 take 600 MB more with a ViT-B, and are hardly faster."""

Source = Union[ImageLike, Callable[[], ImageLike]]
"""An image, or a function that reads it when its turn comes."""


@dataclass(frozen=True)
class Prediction(Result):
    """The best classes of one image.

    Args:
        top: (class name, probability) pairs, best first.
        generation: Counter of the generation that answered; 0 if it is only a part of a damaged
            generation.
    """

    top: tuple[tuple[str, float], ...]
    generation: int

    @property
    def label(self) -> str:
        """Name of the best class."""
        return self.top[0][0]

    @property
    def confidence(self) -> float:
        """Probability of the best class."""
        return self.top[0][1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "top": [{"class": name, "probability": score} for name, score in self.top],
        }


def prepared(
    images: Iterable[Source], prepare: Preprocessing, size: int, max_pixels: int
) -> Iterator[list[np.ndarray | InputError | ResourceError]]:
    """Batches of uint8 (side, side, 3) arrays.

    An image that cannot be read, or that memory ran out for, is replaced by its error.

    Raises:
        TypeError: An item is no image.
    """

    def one(image: Source) -> np.ndarray | InputError | ResourceError:
        try:
            return prepare.pixels(require_image(image() if callable(image) else image), max_pixels)
        except (InputError, ResourceError) as error:
            let_go(error)  # the next image needs the memory
            return error

    rest = iter(images)
    while batch := list(itertools.islice(rest, size)):
        yield [one(image) for image in batch]


def best(
    logits: np.ndarray, classes: Sequence[str | None], generation: int, top: int
) -> Iterator[Prediction]:
    """One prediction for each image.

    Args:
        logits: float32 (N, rows).
        classes: The class of each row; None for a retired one, which is never shown, however large
            `top` is.
        generation: Counter of the generation that computed them.
        top: Number of classes to show.
    """
    live = [(row, name) for row, name in enumerate(classes) if name is not None]
    if not live:
        raise NothingToDo("this device knows no class yet: apply a packet first")
    logits = logits[:, [row for row, _ in live]]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    for row in scores:
        order = np.argsort(-row, kind="stable")[:top]
        yield Prediction(tuple((live[i][1], float(row[i])) for i in order), generation)


class Predictor(ABC):
    """Names the classes of images, with the generation that `_serving` gives."""

    _engine: Engine
    _prepare: Preprocessing

    @abstractmethod
    def _serving(self) -> AbstractContextManager[Live]:
        """The generation to answer with."""

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an iterable, and one image
        self,
        images: ImageLike,
        top: int = ...,
        batch_size: int = ...,
        max_pixels: int = ...,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageLike],
        top: int = ...,
        batch_size: int = ...,
        max_pixels: int = ...,
    ) -> list[Prediction]: ...
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        top: int = 1,
        batch_size: int = BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> Prediction | list[Prediction]:
        """Name the class of an image, or of each image in an iterable.

        Args:
            images: A path (str or Path), encoded bytes, a Pillow image, a uint8 array (H, W, 3) or
                (H, W), or an iterable of these.
            top: Number of classes to show for each image.
            batch_size: Images to compute together; more take more memory.
            max_pixels: Refuse an image with more pixels.

        Returns:
            One prediction for one image, a list for an iterable.

        Raises:
            TypeError: Something is no image.
            InputError: An image cannot be read, or has too many pixels; the message names it.
            ResourceError: Memory ran out.
            UsageError: `top` or `batch_size` is below 1.
            NothingToDo: The device knows no class yet.
        """
        each, one = one_or_many(images)
        found = []
        for answer in self.predict_each(each, top, batch_size, max_pixels):
            if not isinstance(answer, Prediction):
                raise answer
            found.append(answer)
        return found[0] if one else found

    def predict_each(
        self,
        images: Iterable[Source],
        top: int = 1,
        batch_size: int = BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Prediction | InputError | ResourceError]:
        """As `predict`, one answer after the other.

        An image that cannot be read gets its error in place of an answer.

        One generation answers the whole batch. An update may come between two batches.
        """
        if top < 1 or batch_size < 1:
            raise UsageError(f"top {top} and batch_size {batch_size} must be at least 1")
        for batch in prepared(images, self._prepare, batch_size, max_pixels):
            readable = [image for image in batch if isinstance(image, np.ndarray)]
            found = self._answered(readable, top) if readable else iter(())
            for image in batch:
                yield next(found) if isinstance(image, np.ndarray) else image

    def _answered(self, pixels: Sequence[np.ndarray], top: int) -> Iterator[Prediction]:
        with noticed(f"while {len(pixels)} images were answered together"), self._serving() as live:
            logits = self._engine.run(live.loaded, self._prepare.normalise(np.stack(pixels)))
        return best(logits, live.state.classes, live.counter, top)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Preprocessed inputs, float32 (N, 3, size, size), to logits, float32 (N, live classes)."""
        with self._serving() as live:
            return self._engine.run(live.loaded, inputs)[:, live.state.live]

"""From images to answers, batch by batch: memory does not grow with the number of images."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Union, overload

import numpy as np

from ..errors import HealthError, InputError, NothingToDo, ResourceError, UsageError
from ..inputs.image_files import ImageLike
from ..inputs.modality import Inputs, Preparation
from ..inputs.sizes import MAX_PIXELS
from ..results import Result
from ..shortage import noticed
from ..state import TaskState
from .engines import Engine, Outputs
from .gate import let_go
from .generation import Live

BATCH = 8
"""images. Batches of 32 take 600 MB more with a ViT-B, and are hardly faster."""

Source = Union[ImageLike, Callable[[], ImageLike]]
"""An image, or a function that reads it when its turn comes."""


Unanswered = Union[InputError, ResourceError, HealthError]
"""In place of an answer: the image cannot be read, memory ran out, or the model failed."""


@dataclass(frozen=True)
class Prediction(Result):
    """The best classes of one image, and whether it shows any known class at all.

    Args:
        top: (class name, calibrated probability) pairs, best first. An unknown image has them too:
            they are guesses among the known classes.
        generation: Counter of the generation that answered; 0 if it is only a part of a damaged
            generation.
        known: Whether the image is of a known class: `score >= threshold`.
        score: How well the image fits the known classes (`Confidence.scores`); higher is better
            known. Scores of two generations cannot be compared.
        threshold: What `score` was compared with; None if every image counts as known.
    """

    top: tuple[tuple[str, float], ...]
    generation: int
    known: bool
    score: float
    threshold: float | None

    @property
    def answer(self) -> str | None:
        """Name of the best class; None if the image is unknown."""
        return self.label if self.known else None

    @property
    def label(self) -> str:
        """Name of the best class, even if the image is unknown."""
        return self.top[0][0]

    @property
    def confidence(self) -> float:
        """Probability of the best class."""
        return self.top[0][1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "known": self.known,
            "score": self.score,
            "threshold": self.threshold,
            "generation": self.generation,
            "top": [{"class": name, "probability": p} for name, p in self.top],
        }


@dataclass(frozen=True, eq=False)
class Answered:
    """An answer, and what the model saw in the image.

    Args:
        prediction: The answer.
        features: float32 (features,), as the unknown score takes them; None if the model has no
            such output.
    """

    prediction: Prediction
    features: np.ndarray | None


@dataclass(frozen=True)
class Asked:
    """What a caller wants of each answer.

    Args:
        top: Number of classes to show.
        threshold: In place of the one of the state; None leaves it as it is.

    Raises:
        UsageError: `top` is below 1, or `threshold` is not finite.
    """

    top: int = 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"top {self.top} must be at least 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"threshold {self.threshold} must be a finite number")


def prepared(
    images: Iterable[Source], prepare: Preparation, size: int, max_pixels: int
) -> Iterator[list[np.ndarray | InputError | ResourceError]]:
    """Batches of items, arrays of `prepare.shape`.

    An image that cannot be read, or that memory ran out for, is replaced by its error.

    Raises:
        TypeError: An item is no image.
    """

    def one(image: Source) -> np.ndarray | InputError | ResourceError:
        try:
            return prepare.item(image() if callable(image) else image, max_pixels)
        except (InputError, ResourceError) as error:
            let_go(error)  # the next image needs the memory
            return error

    rest = iter(images)
    while batch := list(itertools.islice(rest, size)):
        yield [one(image) for image in batch]


def best(
    outputs: Outputs, state: TaskState, generation: int, asked: Asked
) -> Iterator[Prediction | HealthError]:
    """One answer for each image.

    Outputs that are not finite have no best class or no score. Such an image gets an error: to call
    it known, or unknown, would hide that the engine is damaged.

    Args:
        outputs: Of N images. Rows of retired classes are never shown, whatever they hold.
        state: What computed them.
        generation: Counter of its generation.
        asked: What to show.
    """
    if not state.live:
        raise NothingToDo("this device knows no class yet: apply a packet first")
    logits, features = outputs.logits[:, state.live], outputs.features
    finite = np.isfinite(logits).all(axis=1)
    if features is not None:
        finite &= np.isfinite(features).all(axis=1)
        features = features[finite]
    answers = _answers(Outputs(logits[finite], features), state, generation, asked)
    for one in finite:
        yield (
            next(answers)
            if one
            else HealthError(
                "the model computed outputs that are not finite: open the store again; "
                "if this comes back, run sdlora-edge device selftest"
            )
        )


def _answers(
    outputs: Outputs, state: TaskState, generation: int, asked: Asked
) -> Iterator[Prediction]:
    """outputs: Of the live rows alone, and finite."""
    confidence, names = state.confidence, state.names
    threshold = confidence.least if asked.threshold is None else asked.threshold
    scores = confidence.scores(*outputs).tolist()
    for row, score in zip(confidence.probabilities(outputs.logits), scores, strict=True):
        known = threshold is None or score >= threshold
        order = np.argsort(-row, kind="stable")[: asked.top]
        top = tuple((names[i], float(row[i])) for i in order)
        yield Prediction(top, generation, known, score, threshold)


class Predictor(ABC):
    """Names the classes of images, with the generation that `_serving` gives."""

    _engine: Engine
    _prepare: Preparation

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
        threshold: float | None = ...,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        images: Iterable[ImageLike],
        top: int = ...,
        batch_size: int = ...,
        max_pixels: int = ...,
        threshold: float | None = ...,
    ) -> list[Prediction]: ...
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        top: int = 1,
        batch_size: int = BATCH,
        max_pixels: int = MAX_PIXELS,
        threshold: float | None = None,
    ) -> Prediction | list[Prediction]:
        """Name the class of an image, or of each image in an iterable.

        Args:
            images: A path (str or Path), encoded bytes, a Pillow image, a uint8 array (H, W, 3) or
                (H, W), or an iterable of these.
            top: Number of classes to show for each image.
            batch_size: Images to compute together; more take more memory.
            max_pixels: Refuse an image with more pixels.
            threshold: Images with a lower score are unknown, in place of the state's own threshold.
                Raise it to be asked more often, lower it to get more answers.

        Returns:
            One prediction for one image, a list for an iterable.

        Raises:
            TypeError: Something is no image.
            InputError: An image cannot be read, or has too many pixels; the message names it.
            ResourceError: Memory ran out.
            HealthError: The model computed outputs that are not finite: it is damaged, or the image
                makes it overflow.
            UsageError: `top` or `batch_size` is below 1, or `threshold` is not finite.
            NothingToDo: The device knows no class yet.
        """
        each, one = self._prepare.many(images)
        found = []
        for answer in self.predict_each(each, top, batch_size, max_pixels, threshold):
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
        threshold: float | None = None,
    ) -> Iterator[Prediction | Unanswered]:
        """As `predict`, one answer after the other.

        An image that cannot be read or answered gets its error in place of an answer.

        One generation answers the whole batch. An update may come between two batches.
        """
        for found in self.answer_each(images, Asked(top, threshold), batch_size, max_pixels):
            yield found.prediction if isinstance(found, Answered) else found

    def answer_each(
        self,
        images: Iterable[Source],
        asked: Asked,
        batch_size: int = BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Answered | Unanswered]:
        """As `predict_each`, with the features of each image."""
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} must be at least 1")
        for batch in prepared(images, self._prepare, batch_size, max_pixels):
            readable = [image for image in batch if isinstance(image, np.ndarray)]
            found = iter(self.answer_prepared(readable, asked, batch_size) if readable else ())
            for image in batch:
                yield next(found) if isinstance(image, np.ndarray) else image

    @property
    def preparation(self) -> Preparation:
        """What this model reads, and how."""
        return self._prepare

    def prepare(self, image: ImageLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """An image as `answer_prepared` takes it: an array of `Preparation.shape`.

        Raises:
            TypeError: It is no image.
            InputError: It cannot be read, or has too many pixels.
        """
        return self._prepare.item(image, max_pixels)

    def answer_prepared(
        self, pixels: Sequence[np.ndarray], asked: Asked, batch_size: int = BATCH
    ) -> list[Answered | HealthError]:
        """As `answer_each`, of what `prepare` made. One generation answers all of them."""
        doing = f"while {min(len(pixels), batch_size)} images were answered together"
        found: list[Answered | HealthError] = []
        with noticed(doing), self._serving() as live:
            for begin in range(0, len(pixels), batch_size):
                inputs = self._prepare.arrays(np.stack(pixels[begin : begin + batch_size]))
                outputs = self._engine.outputs(live.loaded, inputs)
                features = itertools.repeat(None) if outputs.features is None else outputs.features
                for one, row in zip(best(outputs, live.state, live.counter, asked), features):
                    found.append(one if isinstance(one, HealthError) else Answered(one, row))
        return found

    def logits(self, inputs: Inputs) -> np.ndarray:
        """What `Preparation.arrays` made of N items to logits, float32 (N, live classes)."""
        with self._serving() as live:
            return self._engine.run(live.loaded, inputs)[:, live.state.live]

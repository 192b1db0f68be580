"""Requests that come at the same time are answered together, and no more wait than memory allows.

An image is admitted or refused at once (`Busy`). Then a few threads decode it, and one thread
answers all that are ready, up to a batch. It waits for others only while they are being decoded,
and never longer than `Limits.wait`: a lone request is answered without delay.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Union

import numpy as np

from ..device.answers import BATCH, Answered, Asked, Prediction
from ..device.device import Device
from ..device.gate import let_go
from ..errors import InputError, ResourceError, SdloraError, UsageError
from ..fleet.closing import Closing
from ..inputs.image_files import ImageLike
from ..inputs.sizes import MAX_PIXELS
from .room import Room

log = logging.getLogger(__name__)
Answer = Union[Answered, SdloraError]
"""Of one image: the answer, or why there is none."""
OnAnswer = Callable[[ImageLike, Answered], None]
UNTOLD = 32
"""Answers that wait for `on_answer` at most, if their images take no more than `Room.bodies`.
Beyond it they are not told."""


class Busy(ResourceError):
    """Too many images wait for an answer. Nothing was judged: try again."""


@dataclass(frozen=True)
class Limits:
    """What the batcher may take.

    Attributes:
        queue: Images that are admitted and not answered yet, at most.
        wait: Seconds that a decoded image waits for others which are being decoded.
        decoders: Threads that decode.
    """

    queue: int = 64
    wait: float = 0.005
    decoders: int = min(4, os.cpu_count() or 1)


@dataclass(eq=False)
class _Job:
    """Images that one generation answers. `found` has a place for each of them."""

    images: Sequence[ImageLike]
    asked: Asked
    future: Future[list[Answer]] = field(default_factory=Future)
    found: list[np.ndarray | Answer] = field(default_factory=list)

    @property
    def pixels(self) -> list[np.ndarray]:
        return [one for one in self.found if isinstance(one, np.ndarray)]


class Batcher(Closing):
    """Answers images of any number of threads.

    Args:
        device: Returns the device that serves. Raises HealthError while there is none.
        limits: What may wait.
        on_answer: Each is called after each answer, in a thread of its own. Whatever it raises is
            logged. If it is too slow, answers are not told.
        room: What is computed together, and how large an image may be.
        count: Gets the answers of each batch, in the thread that computes.

    Attributes:
        untold: Number of answers that were not told.
    """

    def __init__(
        self,
        device: Callable[[], Device],
        limits: Limits | None = None,
        on_answer: Sequence[OnAnswer] = (),
        room: Room | None = None,
        count: Callable[[list[Prediction]], object] | None = None,
    ) -> None:
        self._device, self.limits, self._on_answer = device, limits or Limits(), on_answer
        self.room, self._count = room or Room(None, BATCH, MAX_PIXELS), count
        self._changed = threading.Condition()
        self._ready: deque[_Job] = deque()
        self._admitted = self._decoding = 0  # images
        self._closed = False
        self._told: queue.SimpleQueue[tuple[ImageLike, Answered] | None] = queue.SimpleQueue()
        self._to_tell = self._to_tell_bytes = self.untold = 0
        self._decoders = ThreadPoolExecutor(self.limits.decoders, "decode")
        self._threads = [
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            for work in (self._answer_all, self._tell_all)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of images that are admitted and not answered yet."""
        return self._admitted

    def submit(self, image: ImageLike, asked: Asked) -> Future[Answered]:
        """Ask for the answer to one image.

        Raises:
            Busy: Too many images wait.
        """
        one: Future[Answered] = Future()
        one.set_running_or_notify_cancel()

        def settle(done: Future[list[Answer]]) -> None:
            try:
                (answer,) = done.result()
                if isinstance(answer, SdloraError):
                    raise answer
                one.set_result(answer)
            except Exception as error:
                one.set_exception(error)

        self.submit_all([image], asked).add_done_callback(settle)
        return one

    def submit_all(self, images: Sequence[ImageLike], asked: Asked) -> Future[list[Answer]]:
        """Ask for the answers to several images, all from one generation.

        An image that cannot be read has its error in place of an answer.

        Raises:
            UsageError: They are more than may ever wait.
            Busy: Too many images wait.
        """
        if len(images) > self.limits.queue:
            raise UsageError(f"{len(images)} at once: send at most {self.limits.queue}")
        job = _Job(images, asked)
        job.future.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                raise Busy("the agent is stopping: try again later")
            if self._admitted + len(images) > self.limits.queue:
                raise Busy(f"{self._admitted} wait for an answer: try again later")
            self._admitted += len(images)
            self._decoding += len(images)
        self._decoders.submit(self._decode, job)
        return job.future

    def close(self) -> None:
        """Answer what is admitted, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._decoders.shutdown()
        with self._changed:
            self._changed.notify_all()
        self._threads[0].join()
        self._told.put(None)
        self._threads[1].join()

    def _decode(self, job: _Job) -> None:
        try:
            device = self._device()
            job.found += [self._prepared(device, image) for image in job.images]
        except Exception as error:
            self._settle(job, error)
        with self._changed:
            self._decoding -= len(job.images)
            if not job.future.done():
                self._ready.append(job)
            self._changed.notify_all()

    def _prepared(self, device: Device, image: ImageLike) -> np.ndarray | SdloraError:
        try:
            with self.room.decoding(device.preparation.decoded(image)):
                return device.prepare(image, self.room.pixels)
        except (InputError, ResourceError) as error:
            let_go(error)  # of the image: it may be decoded but for its end
            return error

    def _answer_all(self) -> None:
        while jobs := self._next():
            try:
                self._answer(jobs)
            except Exception as error:
                for job in jobs:
                    self._settle(job, error)

    def _next(self) -> list[_Job]:
        """The jobs to answer together; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or (self._closed and not self._decoding))
            end = time.monotonic() + self.limits.wait
            batch = self.room.batch
            while self._decoding and len(self._ready) < batch:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            jobs: list[_Job] = []
            count = 0
            while self._ready and (not jobs or count + len(self._ready[0].images) <= batch):
                jobs.append(self._ready.popleft())
                count += len(jobs[-1].images)
            return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        pixels = [one for job in jobs for one in job.pixels]
        asked = Asked(max(job.asked.top for job in jobs))
        batch = self.room.batch
        rest = iter(self._device().answer_prepared(pixels, asked, batch) if pixels else ())
        for job in jobs:
            found = [next(rest) if isinstance(one, np.ndarray) else one for one in job.found]
            answers = [_as_asked(one, job.asked) for one in found]
            if self._count:
                self._count([one.prediction for one in answers if isinstance(one, Answered)])
            self._settle(job, answers)
        self.room.computed(min(len(pixels), batch))

    def _settle(self, job: _Job, outcome: list[Answer] | Exception) -> None:
        if job.future.done():
            return
        with self._changed:
            self._admitted -= len(job.images)
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
            return
        job.future.set_result(outcome)
        for image, answer in zip(job.images, outcome):
            if self._on_answer and isinstance(answer, Answered):
                self._tell_later(image, answer)

    def _tell_later(self, image: ImageLike, answer: Answered) -> None:
        size = _held_bytes(image)
        with self._changed:
            room = self._to_tell_bytes + size <= self.room.bodies or not self._to_tell
            if self._to_tell >= UNTOLD or not room:
                self.untold += 1
                return
            self._to_tell += 1
            self._to_tell_bytes += size
        self._told.put((image, answer))

    def _tell_all(self) -> None:
        while (told := self._told.get()) is not None:
            for tell in self._on_answer:
                try:
                    tell(*told)
                except Exception:
                    log.exception("what is called after each answer failed")
            with self._changed:
                self._to_tell -= 1
                self._to_tell_bytes -= _held_bytes(told[0])


def _held_bytes(image: ImageLike) -> int:
    """Bytes of memory that an image takes until it is told of."""
    if isinstance(image, bytes):
        return len(image)
    return image.nbytes if isinstance(image, np.ndarray) else 0


def _as_asked(answer: Answer, asked: Asked) -> Answer:
    """An answer with as many classes as were asked for, by the threshold that was asked for."""
    if isinstance(answer, SdloraError):
        return answer
    found = answer.prediction
    if asked.threshold is not None:
        known = found.score >= asked.threshold
        found = replace(found, known=known, threshold=asked.threshold)
    return replace(answer, prediction=replace(found, top=found.top[: asked.top]))

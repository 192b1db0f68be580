"""From cameras to answers to places that take them.

A camera has one image in the agent at a time. Of a live camera, others pass by meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

from ..device.answers import Answered, Asked
from ..errors import SdloraError
from ..fleet.closing import Closing
from ..inputs.image_files import ImageLike
from .batching import Busy
from .held import Unserved
from .sinks import Outcome, Sink, document
from .sources import Camera, Frame

log = logging.getLogger("sdlora_edge")
Submit = Callable[[ImageLike, Asked], "Future[Answered]"]
LOOK = 0.5
"""seconds between two tries, and between two looks whether the feed was closed"""


class Feed(Closing):
    """Answers what a camera gives, in a thread of its own, until it is closed.

    Args:
        camera: Is closed with it.
        submit: Asks for an answer (`Batcher.submit`).
        asked: What of each answer.
        sinks: Get each answer. They are not closed with it.

    Attributes:
        passed: Number of images of a live camera that were not answered: the agent had no room, or
            no model to serve.
        over: Set once the camera gives no more images, such as after the end of a video file.
    """

    def __init__(
        self, camera: Camera, submit: Submit, asked: Asked, sinks: Sequence[Sink] = ()
    ) -> None:
        self._camera, self._submit, self._asked, self._sinks = camera, submit, asked, sinks
        self.passed, self._trouble = 0, ""
        self.over, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"feed {camera.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, without an answer to the image that is under way."""
        self._closed.set()
        self._camera.close()
        self._thread.join(2 * LOOK)

    def _run(self) -> None:
        try:
            for frame in self._camera.frames():
                self._try(frame)
        except Exception:
            log.exception("--camera %s: nothing is taken from it any more", self._camera.name)
        finally:
            self.over.set()

    def _try(self, frame: Frame) -> None:
        try:
            self._take(frame)
        except Exception as error:  # the next image may go better
            if (trouble := repr(error)) != self._trouble:  # a lasting trouble is told once
                log.exception("--camera %s: an image got no answer", self._camera.name)
                self._trouble = trouble

    def _take(self, frame: Frame) -> None:
        while not self._closed.is_set():
            try:
                outcome = self._outcome(self._submit(frame.image, self._asked))
            except (Busy, Unserved):
                if not self._camera.waits:
                    self.passed += 1
                    return
                self._closed.wait(LOOK)
            except SdloraError as error:
                return self._tell(frame, error)
            else:
                return self._tell(frame, outcome.prediction) if outcome else None

    def _outcome(self, future: Future[Answered]) -> Answered | None:
        while not self._closed.is_set():
            try:
                return future.result(LOOK)
            except NotYet:
                if future.done():  # it is the answer that raised this
                    raise
        return None

    def _tell(self, frame: Frame, outcome: Outcome) -> None:
        data = document(frame, outcome)
        for sink in self._sinks:
            sink.put(data)

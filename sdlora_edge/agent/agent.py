"""`device run`: one process that follows updates, serves predictions, and reports."""

from __future__ import annotations

from pathlib import Path

from ..device.device import Device
from ..fleet.closing import Closing
from .batching import Batcher, Limits, OnAnswer


class Agent(Closing):
    """A served store.

    Attributes:
        batcher: Answers images.
        on_answer: Each is called after each answer, off the path of requests, with the image as it
            was submitted and its answer. Whatever it raises is logged.
    """

    def __init__(self, store: Path, limits: Limits | None = None) -> None:
        self._device = Device.open(store)
        self.on_answer: list[OnAnswer] = []
        self.batcher = Batcher(lambda: self.device, limits, self.on_answer)

    @property
    def device(self) -> Device:
        """The device that serves. Raises HealthError while there is none."""
        return self._device

    def close(self) -> None:
        """Answer what is admitted, and end."""
        self.batcher.close()

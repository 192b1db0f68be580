"""What hangs on an agent beside its HTTP: cameras, places that take answers, unknown images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..device.answers import Asked
from ..errors import UsageError
from ..fleet.mqtt_link import Options
from .agent import Agent
from .feeding import Feed
from .sinks import STDOUT, Sink, sink
from .sources import camera
from .unknowns import Unknowns, blur_of


@dataclass(frozen=True)
class Wanted:
    """What to attach.

    Attributes:
        cameras: As `sources.camera` takes them.
        interval: Seconds between two images of a camera.
        answers: Places, as `sinks.sink` takes them; if there is none, stdout.
        top: Number of classes in an answer.
        keep_unknown: Folder for unknown images; None keeps none.
        keep_mb, keep_per_day: As of `Unknowns`.
        blur: MODULE:FUNCTION; None keeps images as they are.
    """

    cameras: tuple[str, ...] = ()
    interval: float = 1.0
    answers: tuple[str, ...] = ()
    top: int = 1
    keep_unknown: Path | None = None
    keep_mb: float = 100
    keep_per_day: int = 50
    blur: str | None = None

    def __post_init__(self) -> None:
        if self.answers and not self.cameras:
            raise UsageError("--answers takes the answers to cameras: give --camera too")
        if self.blur and self.keep_unknown is None:
            raise UsageError("--blur changes what is kept: give --keep-unknown too")

    @property
    def places(self) -> tuple[str, ...]:
        """Where the answers go."""
        return self.answers or ((STDOUT,) if self.cameras else ())

    @property
    def to_stdout(self) -> bool:
        """Whether answers go to stdout, where nothing else may stand then."""
        return STDOUT in self.places


@dataclass(frozen=True)
class Attached:
    """What is attached, for its counts."""

    feeds: tuple[Feed, ...]
    sinks: tuple[Sink, ...]
    unknowns: Unknowns | None


@contextlib.contextmanager
def attach(agent: Agent, wanted: Wanted, options: Options | None = None) -> Iterator[Attached]:
    """While this block runs, the agent answers the cameras and keeps unknown images.

    options: How to reach the places that take answers. None: as the environment says.

    Raises:
        UsageError: A camera, a place or a folder cannot be used, or a package is missing.
        InputError: A video file cannot be read.
        StorageError: The folder for unknown images cannot be made.
    """
    with contextlib.ExitStack() as stack:
        unknowns = None
        if wanted.keep_unknown is not None:
            blur = blur_of(wanted.blur) if wanted.blur else None
            bounds = wanted.keep_mb, wanted.keep_per_day
            unknowns = Unknowns(
                wanted.keep_unknown, *bounds, blur, lambda: type(agent.device.preparation)
            )
            agent.on_answer.append(unknowns)
            stack.callback(agent.on_answer.remove, unknowns)
        cameras = [stack.enter_context(camera(c, wanted.interval)) for c in wanted.cameras]
        sinks = tuple(stack.enter_context(sink(place, options)) for place in wanted.places)
        submit, asked = agent.batcher.submit, Asked(wanted.top)
        feeds = tuple(stack.enter_context(Feed(c, submit, asked, sinks)) for c in cameras)
        yield Attached(feeds, sinks, unknowns)

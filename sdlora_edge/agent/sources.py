"""Cameras: a device number, a stream, a video file or a folder, one image at a time.

    0                      a camera of this machine      through OpenCV (extra `camera`)
    rtsp://..., http://... a stream                      through OpenCV
    FILE                   a video file, to its end      through OpenCV
    FOLDER                 images as they appear         without OpenCV

Of a camera and of a stream only the newest frame is taken: a thread reads all of them, so that
nothing waits in a buffer. If one breaks, it is opened again, later each time. The thread may hang
in a driver or a socket; nothing waits for it, neither the answers nor the end of the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import stat
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from ..errors import InputError, SdloraError, UsageError
from ..fleet.closing import Closing
from ..fleet.extras import need
from ..inputs.image_files import SUFFIXES, ImageLike
from ..storage import atomic

if TYPE_CHECKING:
    from cv2 import VideoCapture

log = logging.getLogger("sdlora_edge")
STREAMS = "rtsp", "rtsps", "http", "https"
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""seconds before a broken source is opened again: the first bound, and that of all"""
OPENING, READING = 10_000, 10_000
"""milliseconds that OpenCV waits for a stream to open, and for its next frame"""
SETTLED = 0.5
"""seconds for which a file in a folder keeps its size before it is read"""
JOIN = 1.0
"""seconds that `close` waits for a thread that may hang"""


@dataclass(frozen=True)
class Frame:
    """An image and where it comes from.

    Attributes:
        image: As `predict` takes it.
        source: The camera, without a password; of a folder, the file.
        time: Seconds since 1970.
    """

    image: ImageLike
    source: str
    time: float


class Camera(Closing):
    """Gives images until it is closed, or, of a video file, until the end.

    Args:
        place: As a person names it.
        interval: Seconds between two images; 0 takes each one.
    """

    def __init__(self, place: str, interval: float) -> None:
        self.name = without_password(place)
        self._place, self._interval = place, interval
        self._stopped = threading.Event()

    def frames(self) -> Iterator[Frame]:
        """Each image, when it is due."""
        due = time.monotonic()
        for image, source in self._images():
            yield Frame(image, source, time.time())
            # From now on if the answer took longer: missed images are not made up for.
            due = max(due + self._interval, time.monotonic()) if self._is_live else due
            if self._stopped.wait(due - time.monotonic()):
                return

    def close(self) -> None:
        """End `frames`, at once. Any thread may call it."""
        self._stopped.set()

    waits = False
    """Whether an image is worth another try if the agent has no room for it. Of a live camera,
    another one comes."""
    _is_live = True
    """Whether time passes at the source while nobody looks."""

    @abstractmethod
    def _images(self) -> Iterator[tuple[ImageLike, str]]:
        """Yield (image, where it comes from). Blocks until there is one; ends if closed."""


def camera(place: str, interval: float = 1.0) -> Camera:
    """The camera of this name.

    Raises:
        UsageError: There is no such camera, its package is not installed, or the interval is
            negative.
    """
    if not 0 <= interval < float("inf"):
        raise UsageError(f"an interval of {interval:g} s: give 0 or more seconds")
    if Path(place).is_dir():
        return Folder(place, interval)
    if place.isdecimal() or urlsplit(place).scheme in STREAMS:
        return Live(place, interval)
    if Path(place).is_file():
        return Video(place, interval)
    raise UsageError(
        f"--camera {without_password(place)}: there is no such file or folder: give a number, an "
        f"address ({'://, '.join(STREAMS)}://), a video file or a folder of images"
    )


def without_password(place: str) -> str:
    """An address without user and password."""
    parts = urlsplit(place)
    if "@" not in parts.netloc:
        return place
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class Folder(Camera):
    """Images as they appear in a folder, by name; each version of a file once."""

    waits = True

    def _images(self) -> Iterator[tuple[ImageLike, str]]:
        done: dict[str, tuple[int, int]] = {}
        seen: dict[str, tuple[int, int]] = {}
        trouble = ""
        while not self._stopped.is_set():
            try:
                found, trouble = _versions(Path(self._place)), ""
            except SdloraError as error:
                if str(error) != trouble:
                    log.warning("--camera: %s", trouble := str(error))
                found = {}
            ready = [n for n, version in found.items() if seen.get(n) == version != done.get(n)]
            # Of a file that has gone, nothing is remembered.
            seen, done = found, {n: version for n, version in done.items() if n in found}
            for name in ready:
                done[name] = found[name]
                path = Path(self._place, name)
                yield path, str(path)
            self._stopped.wait(SETTLED)


def _versions(folder: Path) -> dict[str, tuple[int, int]]:
    """{name: (time, bytes)} of the images in a folder, sorted. Raises InputError."""
    found = {}
    with atomic.reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in SUFFIXES and not entry.name.startswith("."):
                with contextlib.suppress(OSError):  # it has gone meanwhile, or is a loop of links
                    version = entry.stat()
                    if stat.S_ISREG(version.st_mode):
                        found[entry.name] = version.st_mtime_ns, version.st_size
    return dict(sorted(found.items()))


class Video(Camera):
    """The frames of a video file. The interval is in the video's own time: nothing is waited for.

    Raises InputError if the file is no video.
    """

    waits, _is_live = True, False

    def __init__(self, place: str, interval: float) -> None:
        super().__init__(place, interval)
        self._capture = _opened(place)

    def _images(self) -> Iterator[tuple[ImageLike, str]]:
        cv2, due = _opencv(), 0.0
        while not self._stopped.is_set() and self._capture.grab():
            if self._capture.get(cv2.CAP_PROP_POS_MSEC) < due:
                continue
            due += 1000 * self._interval
            read, frame = self._capture.retrieve()
            if read:
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), self.name
        self._capture.release()


class Live(Camera):
    """The newest frame of a camera or a stream."""

    def __init__(self, place: str, interval: float) -> None:
        super().__init__(place, interval)
        self._cv2 = _opencv()
        self._news = threading.Condition()
        self._wanted, self._newest = False, None
        self._thread = threading.Thread(target=self._read, name=f"camera {self.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End `frames`, and the thread that reads if it does not hang."""
        super().close()
        with self._news:
            self._news.notify_all()
        self._thread.join(JOIN)

    def _images(self) -> Iterator[tuple[ImageLike, str]]:
        while True:
            with self._news:
                # Only what is grabbed from now on counts, and only that is converted.
                self._wanted, self._newest = True, None
                self._news.wait_for(lambda: self._newest is not None or self._stopped.is_set())
                image = self._newest
            if self._stopped.is_set() or image is None:
                return
            yield image, self.name

    def _read(self) -> None:
        """Grab every frame; after a loss, open the source again, later each time."""
        troubles = 0
        while not self._stopped.is_set():
            try:
                with_frames = self._read_until_lost(_opened(self._place), troubles)
                error = f"{self.name} gives no more frames"
            except Exception as unopened:  # OpenCV raises whatever a driver leads it to
                with_frames, error = False, str(unopened)
            if self._stopped.is_set():
                return
            troubles = 1 if with_frames else troubles + 1
            if troubles == 1:  # a lasting trouble is told once
                log.warning("--camera: %s: it is opened again until it does", error)
            bound = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(troubles - 1, 10))
            self._stopped.wait(bound * random.uniform(0.5, 1))  # noqa: S311

    def _read_until_lost(self, capture: VideoCapture, troubles: int) -> bool:
        """Whether there was a frame."""
        count = 0
        while not self._stopped.is_set() and capture.grab():
            count += 1
            if count == 1 and troubles:
                log.warning("--camera: %s gives frames again", self.name)
            if self._wanted:
                read, frame = capture.retrieve()
                if read:
                    self._hand_over(self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB))
        capture.release()
        return count > 0

    def _hand_over(self, image: Any) -> None:
        with self._news:
            self._wanted, self._newest = False, image
            self._news.notify_all()


def _opencv() -> Any:
    """OpenCV, which would print what we say ourselves, addresses with passwords included."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return need("cv2", "camera")


def _opened(place: str) -> VideoCapture:
    """Open a source. Raises InputError."""
    cv2 = _opencv()
    if place.isdecimal():
        capture = cv2.VideoCapture(int(place))
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    else:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPENING, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READING]
        capture = cv2.VideoCapture(place, cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        raise InputError(f"{without_password(place)} cannot be opened: check that it gives a video")
    opened: VideoCapture = capture
    return opened

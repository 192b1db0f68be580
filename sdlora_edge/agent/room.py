"""How much memory the agent may take, and what fits into it: small devices get smaller batches.

A model's memory for a batch is not known before it has computed one. So batches begin with one
image and double while the process, by what the last doubling took, stays within its limit. If that
is low, memory is given back to the system as soon as it is free, at the cost of some speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError
from ..selftest.workers import forget_peak, memory

log = logging.getLogger(__name__)
CGROUP, MEMINFO = Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")
MB = 10**6
SMALL = 1000 * MB
"""A lower limit is that of a small device."""
ARENA = "SDLORA_EDGE_ONNX_ARENA"
"""of `engines.onnx_runtime`, which is imported only when a model is opened"""
MALLOPT = {-1: 1 << 20, -3: 1 << 19, -8: 2}
"""glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX on a small device: the first two would
grow to 64 MB by themselves, and each thread would have a heap of its own"""
DECODED = 12
"""bytes that a pixel takes while an image is decoded and turned; up to 20 in a WebP"""
BODIES = 64 * MB
"""bytes of all bodies that are held at a time, at most"""
TEXT = 8 * MB
"""bytes of the JSON of a request, at most: parsing stops every other thread, for up to a second"""
PARSED = 32
"""bytes that a byte of JSON takes while it is parsed, at most"""


def peak() -> int:
    """The most bytes of memory that this process has had; 0 if the system does not say."""
    try:
        return memory().peak
    except (OSError, KeyError, ValueError):  # not Linux
        return 0


def usual_limit() -> int:
    """What the process may take if nobody says: the container's limit, or half of the memory."""
    try:
        return int(CGROUP.read_text())
    except (OSError, ValueError):  # none, or "max"
        pass
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemTotal"].split()[0]) * 1024 // 2
    except (OSError, KeyError, ValueError, IndexError):
        return 1 << 30


def give_back() -> None:
    """Give memory that is free back to the system: opening a model, or an update, leaves much."""
    _libc("malloc_trim", 0)


def _libc(name: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        getattr(ctypes.CDLL(None), name)(*arguments)


class Room:
    """What fits into the memory.

    Args:
        megabytes: The limit that was given; None takes the usual one.
        batch: Images that are computed together at most.
        pixels: Of an image, at most.

    Attributes:
        batch: Images that may be computed together now.
    """

    def __init__(self, megabytes: int | None, batch: int, pixels: int) -> None:
        self._given, self._most, self._pixels = megabytes, batch, pixels
        self.limit = usual_limit() if megabytes is None else megabytes * MB
        self.batch = 1
        self._before, self._warned = 0, False
        self._turn, self._changed, self._decoding = threading.Lock(), threading.Condition(), 0
        if self.limit < SMALL:
            os.environ.setdefault(ARENA, "0")
            for parameter, value in MALLOPT.items():
                _libc("mallopt", parameter, value)

    def opened(self) -> None:
        """Begin with the memory that the model has taken.

        Raises:
            ResourceError: It is more than the limit that was given.
        """
        give_back()
        with contextlib.suppress(OSError):  # not Linux: then opening counts too
            forget_peak()
        self._before = peak()
        if self._given is not None and self._left() < DECODED * MB:
            raise ResourceError(
                f"serving this model takes {self._before // MB} MB and at least {DECODED} more to "
                f"answer, but --memory-limit is {self._given}: raise it, or export a smaller "
                "model or precision"
            )

    def warn(self) -> None:
        """Warn, once, if the process has taken more than the limit that was given."""
        if self._given is not None and not self._warned and (most := peak()) > self.limit:
            self._warned = True
            log.warning("%d MB are taken: --memory-limit %d is too low", most // MB, self._given)

    def computed(self, count: int) -> None:
        """Note that a batch of so many images was computed, and allow the next size if it fits."""
        if count < self.batch or self.batch >= self._most:
            return
        now = peak()
        growth, self._before = now - self._before, now
        if now + 2 * growth > self.limit:
            log.warning(
                "batches of %d at most: more would need more than %d MB of memory",
                self.batch,
                self.limit // MB,
            )
            self._most = self.batch
        self.batch = min(2 * self.batch, self._most)

    @property
    def pixels(self) -> int:
        """Pixels that an image may have, so that it can be decoded in half of what is left."""
        return max(MB, min(self._pixels, self._left() // 2 // DECODED))

    @contextlib.contextmanager
    def decoding(self, pixels: int) -> Iterator[None]:
        """Around the decoding of an image: waits until all that are decoded now fit together."""
        with self._turn, self._changed:  # in turn: small images would keep a large one waiting
            self._changed.wait_for(
                lambda: not self._decoding or self._decoding + pixels <= self.pixels
            )
            self._decoding += pixels
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= pixels
                self._changed.notify_all()

    @property
    def bodies(self) -> int:
        """Bytes of all bodies that may be held at a time."""
        return max(MB, min(BODIES, self._left() // 4))

    @property
    def text(self) -> int:
        """Bytes of JSON that may be parsed at a time, in half of what is left."""
        return max(MB, min(TEXT, self._left() // 2 // PARSED))

    def _left(self) -> int:
        return self.limit - self._before

"""Many predictors, and one thread that changes the model under them."""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections.abc import Iterator

import numpy as np  # it brings the BLAS that is looked for below
from threadpoolctl import ThreadpoolController

from ..errors import UsageError
from ..shortage import require_memory

BLAS_BUFFER = 40 << 20
"""bytes; OpenBLAS takes 32 MiB (x86-64, aarch64)"""
_BLAS, _LIMITED = (
    ThreadpoolController(),
    threading.RLock(),
)  # a signal handler may load a model while its thread does


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Compute numpy's matrix products on the calling thread.

    BLAS's own threads go on spinning after each product, on the cores that the canary and every
    prediction need. The limit holds for the whole process, so one caller at a time. Raises
    MemoryError.
    """
    with _LIMITED, _BLAS.limit(limits=1, user_api="blas"):
        _reserve()
        yield


@functools.cache
def _reserve() -> None:
    """Make the first product while there is memory: without it OpenBLAS ends the process.

    It keeps what it got.
    """
    require_memory(BLAS_BUFFER)
    some = np.ones((300, 300), np.float32)
    some @ some


def let_go(error: BaseException) -> None:
    """Release what the frames of an error still refer to: a model may be among it."""
    traceback.clear_frames(error.__traceback__)
    if error.__cause__:
        let_go(error.__cause__)


class Gate:
    """Any number of threads may be `inside`, none while it is `closed`.

    For devices without the memory for two models.

    One thread may close it at a time. A thread that is inside may enter again, as a signal handler
    does. Raises UsageError if a thread would wait for itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[int] = []  # threads
        self._closed, self._closer = False, 0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Enter.

        Waits while it is closed, unless this thread is inside already: then the closer waits for
        this thread.
        """
        me = threading.get_ident()
        with self._changed:
            if self._closed and self._closer == me:
                raise UsageError(
                    "a prediction during an update in place, in the same thread: "
                    "predict in another thread"
                )
            # This may be a signal handler that interrupted its thread just before it notified on
            # its way out.
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._closed or me in self._inside)
            self._inside.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Close it, and wait for those who are inside."""
        if threading.get_ident() in self._inside:
            raise UsageError(
                "an update in place during a prediction, in the same thread: "
                "update in another thread"
            )
        try:  # begins here, because a wait may be interrupted
            with self._changed:
                self._closer = threading.get_ident()  # first: a signal handler may run in between
                self._closed = True
                self._changed.wait_for(lambda: not self._inside)
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()

"""Counts predictions on a device until a report takes them (`ledger`).

Only counts are kept: nothing about an image, nothing about one prediction.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..device.answers import Prediction
from ..errors import SdloraError
from .closing import Closing
from .counts import Counts
from .identity import identity, is_configured, locked
from .ledger import Batch, read_batch, write_batch
from .rollout import LATEST

log = logging.getLogger(__name__)
FLUSH_EVERY = 30.0
"""seconds; a process that is killed loses what it has counted since"""
PATIENCE = 1.0
"""seconds to wait for another process that writes"""


class Tally(Closing):
    """Counts what a program predicts. Any number of programs and threads may count in one store.

    Use it as a context manager, or call `close`. Counting never stops a program: if the store
    cannot be written, a warning is logged, and the counts wait in memory for the next flush.
    """

    def __init__(self, store: Path | str) -> None:
        self._store = Path(store)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._fresh = Counts()
        self._flushed = time.monotonic()
        atexit.register(self.flush)

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Count predictions. What is counted reaches the disk at most every FLUSH_EVERY seconds."""
        counted = Counts.of(predictions)
        with self._lock:
            if os.getpid() != self._process:  # a fork: the parent keeps what it has counted
                self._process, self._fresh = os.getpid(), Counts()
            self._fresh += counted
        if time.monotonic() - self._flushed >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is counted to the disk."""
        with self._lock:
            self._flushed = time.monotonic()
            if not self._fresh.total or os.getpid() != self._process:
                return
            try:
                with locked(self._store, PATIENCE):
                    clock = min(max(0, int(time.time())), LATEST)
                    batch = read_batch(self._store) or Batch.begun(clock)
                    write_batch(self._store, replace(batch, counts=batch.counts + self._fresh))
                self._fresh = Counts()
            except SdloraError as error:
                log.warning("%d predictions are not counted yet: %s", self._fresh.total, error)

    def close(self) -> None:
        """Flush, and count no more at the end of the process."""
        self.flush()
        atexit.unregister(self.flush)


def reports(store: Path) -> bool:
    """Whether a store is configured to report. One that cannot be read is not."""
    try:
        return is_configured(store) and bool(identity(store).report_to)
    except SdloraError:
        return False


@contextlib.contextmanager
def counting(store: Path, wanted: bool | None) -> Iterator[Tally | None]:
    """A tally while the block runs; None if nothing is to be counted.

    wanted: None counts if the store is configured to report.
    """
    if not (reports(store) if wanted is None else wanted):
        yield None
        return
    with Tally(store) as tally:
        yield tally

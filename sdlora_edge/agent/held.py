"""The store that the agent serves: opened in the background, and again if it cannot be opened."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..device.device import Device
from ..device.store import Store
from ..errors import HealthError, SdloraError
from ..fleet.closing import Closing

log = logging.getLogger(__name__)
OPENING = "opening"
LOOK = 1.0
"""seconds between two looks at the store, for what another process has committed"""
LONGEST_WAIT = 60.0
"""seconds until the next try to open a store that cannot be opened, at most"""


class Unserved(HealthError):
    """No model can be served now."""


class Held(Closing):
    """One store, its device, and the thread that opens and refreshes it.

    Args:
        store: The device's directory.
        threads: Of the engine; 0: its own choice.
        checked: Called in the thread with a device before it serves. If it raises, it never serves.
        opened: Called in the thread once the device serves.
        look: Called in the thread after each look.

    Raises:
        InputError: `store` is not a store.
    """

    def __init__(
        self,
        store: Path,
        threads: int,
        checked: Callable[[Device], object],
        opened: Callable[[Device], object],
        look: Callable[[], object],
    ) -> None:
        self._store, self._threads = Store(store).path, threads
        self._checked, self._opened, self._look = checked, opened, look
        self._found: Device | None = None
        self._troubles = dict[str, str]()
        """{what is tried: why it failed}"""
        self._stopped = False
        # a queue, because a signal handler that sets an Event would wait for the Event's lock
        self._orders: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    @property
    def device(self) -> Device:
        """The device. Raises Unserved while the store is not open."""
        if self._found is None:
            trouble = self._troubles.get(OPENING, "it is being opened")
            raise Unserved(f"no model is served: {trouble}: try again later")
        return self._found

    def order(self, call: Callable[[], object]) -> None:
        """Have something called in the thread of the store. Signal handlers may call it."""
        self._orders.put(call)

    def close(self) -> None:
        """End the thread. The device stays as it is."""
        self.order(self._stop)
        self._thread.join()

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        due, wait = time.monotonic(), LOOK
        while not self._stopped:
            if self._found is not None:
                self._try("refreshing", self._found.refresh)
            elif time.monotonic() >= due:
                self._try(OPENING, self._open)
                due, wait = time.monotonic() + wait, min(2 * wait, LONGEST_WAIT)
            self._try("looking", self._look)
            with contextlib.suppress(queue.Empty):
                self._try("an order", self._orders.get(timeout=LOOK))

    def _open(self) -> None:
        device = Device.open(self._store, self._threads)
        self._checked(device)
        self._found = device
        self._opened(device)

    def _try(self, what: str, call: Callable[[], object]) -> None:
        """Call it. A lasting trouble is told once."""
        try:
            call()
        except Exception as error:
            known = isinstance(error, SdloraError)
            if (said := str(error) if known else repr(error)) != self._troubles.get(what):
                log.error("%s", said, exc_info=not known)
                self._troubles[what] = said
        else:
            self._troubles.pop(what, None)

"""How the agent's device gets updates, and tells where it stands: a thread for each of the two.

The device that serves takes the packets itself: a second one would need the memory for a second
model. Its predictions go on meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..device.device import Device
from ..device.watch.events import Emit
from ..device.watch.service import Watcher
from ..fleet.client import Client, Synced
from ..fleet.closing import Closing
from ..fleet.fetching import Link
from ..fleet.follow import Follower, Telling
from ..fleet.identity import identity, is_configured
from ..fleet.mqtt_link import Options
from ..fleet.tally import reports
from .origin import Source

LONGEST_END = 8.0
"""seconds that a server has at the end: containers are killed after ten"""
REPORT_LOOK = 30.0
"""seconds between two looks at whether a report is due"""


@dataclass(frozen=True)
class Told:
    """What the agent wants to know of its updates.

    Attributes:
        emit: Gets each event.
        synced: Called after each look at the repository that went well.
        keep: Called before each look at whether a report is due: what it holds must be on the disk.
    """

    emit: Emit
    synced: Callable[[], object]
    keep: Callable[[], object]


class Updating(Closing):
    """Follows a repository or watches a folder for a device, and reports.

    Args:
        device: What serves, and takes the packets.
        store: Its store.
        source: Where updates come from.
        told: What is told of it.
    """

    def __init__(
        self,
        device: Device,
        store: Path,
        source: Source,
        told: Told,
    ) -> None:
        self._device, self._store, self._source, self._told = device, store, source, told
        link = source.link or Link()
        options = Options.given(link.ca, link.client_cert, link.client_key)
        self._telling = Telling(store, source.report_every, options, device.status)
        self._news: queue.SimpleQueue[Synced | None] = queue.SimpleQueue()
        self._stopped = False
        self._runner = self._made()
        self._reports = threading.Thread(target=self._report, name="reports", daemon=True)
        self._updates = threading.Thread(target=self._update, name="updates", daemon=True)
        self._reports.start()
        self._updates.start()

    def wake(self) -> None:
        """Look for updates now, and report if that is due."""
        if self._runner is not None:
            self._runner.wake()
        self._news.put(None)

    def close(self) -> None:
        """End after the packet that is being applied, and say goodbye to the brokers.

        A download or a report that takes longer than LONGEST_END is given up.
        """
        self._stopped = True
        if self._runner is not None:
            self._runner.stop()
        self._news.put(None)
        end = time.monotonic() + LONGEST_END
        while self._updates.is_alive() and (self._must_end or time.monotonic() < end):
            self._updates.join(0.1)
        self._reports.join(max(0.0, end - time.monotonic()))
        if not self._reports.is_alive():
            self._telling.close()

    @property
    def _must_end(self) -> bool:
        """Whether a packet may be under way: it would be taken for one that killed its process."""
        return isinstance(self._runner, Watcher) or self._device.is_changing

    def _update(self) -> None:
        if isinstance(self._runner, Follower):
            self._runner.run()
        elif self._runner is not None:
            self._runner.run(5.0 if self._source.every is None else self._source.every)

    def _made(self) -> Follower | Watcher | None:
        store, source = self._store, self._source
        if source.folder is not None:
            emit, here = self._told.emit, self._device
            return Watcher(source.folder, store, source.status, emit, opens=lambda: here)
        if source.url is None and not (is_configured(store) and identity(store).url):
            return None

        def client() -> Client:
            return Client(store, source.url, source.link, device=self._device)

        every = 300.0 if source.every is None else source.every
        return Follower(client, every, source.status, self._told.emit, self._looked)

    def _looked(self, done: Synced | None) -> None:
        if done is not None:
            self._told.synced()
        self._news.put(done)

    def _report(self) -> None:
        """Report in a thread of its own: a broker that does not answer must stop no update."""
        while not self._stopped:
            try:
                done = self._news.get(timeout=REPORT_LOOK)
            except queue.Empty:
                done = None
            self._tell(done)

    def _tell(self, done: Synced | None) -> None:
        try:
            if reports(self._store):
                self._told.keep()
                self._telling(done)
        except Exception as error:  # the next one may go better
            self._told.emit("unreported", {"error": str(error)})

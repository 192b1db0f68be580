"""What a watcher remembers of packets beyond its own process: those that failed, and those that processes ended at.

In the store, under the watcher's lock: {"failed": digests of packets whose canary failed, oldest first; "trying": that of the one
being applied, or null; "killed": {digest: how many processes have ended while they applied it}; "paused": {digest: [until when,
in which boot]}}.
"""

from __future__ import annotations

import time
from pathlib import Path

from ...errors import HealthError, InputError
from ...formats.canonical import dump_json, is_sha256, parse_json
from ...formats.container import natural
from ...storage import atomic
from ..store import MEMORY, Store

FAILED_LIMIT = 1000
KILLED_LIMIT = 3
"""times that a process may end at the same packet before it is paused: a power cut is not the packet's fault, nor is memory that
another program takes"""
PAUSE, LONGEST_PAUSE = 3600, 86_400
"""seconds"""
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Memory:
    """Of one store. failed: digests, oldest first."""

    def __init__(self, store: Store) -> None:
        self.failed: dict[str, None] = {}
        self._store, self._path = store, store.path / MEMORY
        self._killed: dict[str, int] = {}
        self._paused: dict[str, tuple[int, str]] = {}

    def left_alone(self) -> set[str]:
        """Packets not to try now. A clock that was set back makes no pause longer than a day."""
        boot, clock = _boot(), time.time()
        paused = {
            d
            for d, (until, when) in self._paused.items()
            if when == boot and 0 < until - clock <= LONGEST_PAUSE
        }
        return {*self.failed, *paused}

    def recollect(self) -> None:
        """Read what other processes have left: one that was trying a packet has ended, for this one holds the lock.

        Raises InputError for what is no memory, HealthError for a packet that is left alone from now on, StorageError.
        """
        last = self._read()
        if not is_sha256(last) or last in self._store.current().digests:
            return
        times = self._killed[last] = min(self._killed.get(last, 0) + 1, 100)
        if times >= KILLED_LIMIT:
            pause = min(PAUSE * 2 ** (times - KILLED_LIMIT), LONGEST_PAUSE)
            self._paused[last] = int(time.time()) + pause, _boot()
        self.write()
        if times >= KILLED_LIMIT:
            again = f"it is tried again in {pause // 3600} h, or after a restart of the machine"
            raise HealthError(
                f"packet {last}: {times} processes ended while they applied it: free memory; {again}"
            )

    def _read(self) -> str:
        """The digest that a process was trying, if one was."""
        if not self._path.exists():
            return ""
        memory = parse_json(atomic.read(self._path), MEMORY)
        try:
            self.failed = dict.fromkeys(filter(is_sha256, memory["failed"]))
            self._killed = {
                digest: natural(times)
                for digest, times in memory["killed"].items()
                if is_sha256(digest)
            }
            paused = memory.get("paused", {}).items()
            self._paused = {
                digest: (natural(until), str(boot))
                for digest, (until, boot) in paused
                if is_sha256(digest)
            }
            last = memory["trying"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._path} is malformed: {error!r}") from error
        return last if isinstance(last, str) else ""

    def tried(self, digest: str) -> None:
        """No process ended at it."""
        self._killed.pop(digest, None)
        self._paused.pop(digest, None)
        self.write()

    def write(self, trying: str | None = None) -> None:
        """Raises StorageError: on a full disk no packet could be applied either."""
        self.failed = dict.fromkeys(list(self.failed)[-FAILED_LIMIT:])
        memory = {
            "failed": list(self.failed),
            "killed": self._killed,
            "paused": self._paused,
            "trying": trying,
        }
        atomic.write(self._path, dump_json(memory), like=self._store.path)


def _boot() -> str:
    """Which start of this machine it is; "" if the system does not say."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""

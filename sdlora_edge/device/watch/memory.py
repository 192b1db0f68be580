"""What outlives a process that applies packets: those that failed, and those that killed it.

`device watch` and `device sync` share it. It lies in the store, under a lock of its own:

    failed    digests of packets whose canary failed, oldest first
    trying    digest of the packet that is being applied alone, or null
    together  digests of the packets that are being applied as one
    singly    digests of packets whose process was killed while they were applied as one. Each is
              tried alone: only then is it known which one is at fault
    killed    {digest: how many processes were killed while they applied it}
    paused    {digest: [until when (Unix seconds), in which boot]}
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...errors import HealthError, InputError
from ...formats.canonical import dump_json, is_sha256, parse_json
from ...formats.limits import natural
from ...storage import atomic
from ..store import MEMORY, Store
from . import policy

FAILED_LIMIT = 1000
KILLED_COUNT_LIMIT = 100
LOCK = "watch.lock"
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Memory:
    """Of one store. failed: digests, oldest first."""

    def __init__(self, store: Store) -> None:
        self.failed: dict[str, None] = {}
        self._store, self._path = store, store.path / MEMORY
        self._killed: dict[str, int] = {}
        self._singly: dict[str, None] = {}
        self._paused: dict[str, tuple[int, str]] = {}

    def left_alone(self) -> set[str]:
        """Packets not to try now."""
        return {*self.failed, *self.paused()}

    def paused(self) -> set[str]:
        """Packets that killed processes and are not to be tried now."""
        boot, clock = _boot(), time.time()
        return {
            digest
            for digest, (until, when) in self._paused.items()
            if when == boot and policy.paused(until, clock)
        }

    def may_go_together(self, digests: Iterable[str]) -> bool:
        """Whether no process was killed while it applied any of these packets."""
        return not any(digest in self._singly or digest in self._killed for digest in digests)

    def recollect(self) -> None:
        """Read what other processes have left.

        If one was trying a packet, it has ended: this process holds the lock. If it was trying
        several as one, none of them is at fault yet.

        Raises:
            InputError: the memory is malformed.
            HealthError: a packet pauses from now on.
            StorageError: the memory cannot be written.
        """
        last = self._read()
        if not is_sha256(last) or last in self._store.current().digests:
            return
        times = self._killed[last] = min(self._killed.get(last, 0) + 1, KILLED_COUNT_LIMIT)
        if pause := policy.pause_seconds(times):
            self._paused[last] = int(time.time()) + pause, _boot()
        self.write()
        if pause:
            raise HealthError(
                f"packet {last}: {times} processes were killed while they applied it: free memory; "
                f"the next try is in {pause // 3600} h, or after this machine restarts"
            )

    def _read(self) -> str:
        """The digest that a process was trying; "" if none was."""
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
            self._paused = {
                digest: (natural(until), str(boot))
                for digest, (until, boot) in memory.get("paused", {}).items()
                if is_sha256(digest)
            }
            together = (*memory.get("singly", ()), *memory.get("together", ()))
            self._singly = dict.fromkeys(filter(is_sha256, together))
            last = memory["trying"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._path} is malformed: {error!r}") from error
        return last if isinstance(last, str) else ""

    @contextlib.contextmanager
    def trying(self, digests: Sequence[str]) -> Iterator[None]:
        """Around the application of these packets as one.

        Leaving it is skipped if the process is killed: that is how the next one knows.

        Raises:
            StorageError: As applying a packet would: the disk is full, or read-only.
        """
        alone = digests[0] if len(digests) == 1 else None
        self.write(alone, () if alone else digests)
        try:
            yield
        finally:
            if alone:
                for known in (self._singly, self._killed, self._paused):
                    known.pop(alone, None)
            self.write()

    def write(self, trying: str | None = None, together: Sequence[str] = ()) -> None:
        """Raises StorageError."""
        self.failed = dict.fromkeys(list(self.failed)[-FAILED_LIMIT:])
        memory = {
            "failed": list(self.failed),
            "killed": self._killed,
            "paused": self._paused,
            "singly": list(self._singly)[-FAILED_LIMIT:],
            "together": list(together),
            "trying": trying,
        }
        atomic.write(self._path, dump_json(memory), like=self._store.path)


def _boot() -> str:
    """The id of this start of the machine; "" if the system does not say."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""

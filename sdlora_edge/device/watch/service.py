"""`device watch`: applies packets as they appear in a folder, whoever puts them there.

A USB stick, MQTT, rsync and scp all end as files in a folder. `scan` says what lies there, `policy`
decides what to do, `journal` keeps what happened. This module is the process: the loop, signals,
systemd, the status file. The model is loaded only while there is something to apply.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from ...errors import (
    UNWRITTEN,
    HealthError,
    InputError,
    ResourceError,
    SdloraError,
    UsageError,
)
from ...results import Applied, AppliedPacket, SkippedPacket, Status
from ...storage import atomic
from ..device import IN_PLACE, Device
from ..records import Generation
from ..store import Store
from . import policy
from .events import Emit, notify, now, to_stderr
from .journal import Journal, Served, WatchReport
from .memory import LOCK, Memory
from .policy import Verdict
from .scan import Scan

HEARTBEAT = 60.0
"""seconds after which the status file is written even if nothing has happened"""
LOOK = 30.0
"""seconds after which a look starts to read or verify no further file: the next look goes on"""
SHORTEST, LONGEST = 0.01, 86_400.0
"""bounds of the seconds between two looks"""
TOGETHER = 100
"""packets that are applied as one, at most: `stop` and systemd's watchdog wait for no more"""
T = TypeVar("T")


def watch(
    folder: Path | str, store: Path | str, interval: float = 5.0, status: Path | None = None
) -> WatchReport:
    """Apply packets as they appear in a folder, until SIGTERM or Ctrl-C. Events go to stderr.

    Args:
        folder: where packets appear. It may be missing for a while.
        store: the device's directory.
        interval: seconds between two looks.
        status: a JSON file to keep for monitoring.

    Raises:
        InputError: `store` is not a store.
        UsageError: the interval is out of bounds, or this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("watch() takes signals: call it in the main thread, or use Watcher.run()")
    watcher = Watcher(Path(folder), Path(store), status)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda *_: watcher.stop())
        return watcher.run(interval)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watcher:
    """One folder and one store.

    Errors of packets, folder and disk become events. Only a store that is not a store raises.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        status: Path | None = None,
        emit: Emit = to_stderr,
        threads: int = 0,
        opens: Callable[[], Device] | None = None,
    ) -> None:
        """
        Args:
            folder: where packets appear.
            store: the device's directory.
            status: the JSON file to keep.
            emit: gets each event.
            threads: of the engine; 0: its own choice.
            opens: the device, if this process has opened it. None: it is opened for each update.

        Raises:
            InputError: `store` is not a store.
        """
        self._store, self._status = Store(store), status
        self._opens = opens or (lambda: Device.open(store, threads, swap=IN_PLACE))
        self._journal = Journal(emit)
        self._scan = Scan(folder, self._journal)
        self._memory = Memory(self._store)
        self._verdicts: dict[str, Verdict] = {}
        self._stopped = False
        # a queue, because a signal handler that sets an Event would wait for the Event's lock
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._failed_looks = 0
        # of the device, when it was last open; -1: it must be opened before the next report
        self._generation, self._served = -1, Served()
        self._keys: int | None = None
        # packets in force whose files are damaged, and when that was last looked for
        self._damaged, self._proved = frozenset[str](), time.monotonic()
        self._written: tuple[str, float] = "", 0.0

    def stop(self) -> None:
        """Make `run` return before the next packet. Any thread or signal handler may call it."""
        self._stopped = True
        self._wake.put(None)

    def wake(self) -> None:
        """Make `run` look now. Any thread or signal handler may call it."""
        self._wake.put(None)

    def run(self, interval: float) -> WatchReport:
        """Look every `interval` seconds until `stop`.

        Raises UsageError if the interval is out of bounds.
        """
        if not SHORTEST <= interval <= LONGEST:
            raise UsageError(
                f"an interval of {interval:g} s: give seconds between {SHORTEST:g} and {LONGEST:g}"
            )
        self._journal.events.tell(
            "started", {"folder": str(self._scan.folder), "store": str(self._store.path)}
        )
        while not self._stopped:
            self.look()
            notify("READY=1\nWATCHDOG=1")
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=policy.wait_seconds(interval, self._failed_looks))
        notify("STOPPING=1")
        report = self._report()
        self._journal.events.tell("stopped", dict(self._journal.counts))
        return report

    def look(self, settled: bool = True) -> WatchReport:
        """Look at the folder once: apply what can be applied.

        Args:
            settled: leave a file alone if it has changed since the look before, and leave what
                takes longer than LOOK to the next look.
        """
        try:
            self._look(settled)
            self._failed_looks = 0
            self._journal.recovered("trouble")
        except Exception as error:  # the next look may go better, and the device serves meanwhile
            self._failed_looks = min(self._failed_looks + 1, 30)
            self._journal.trouble("trouble", error)
        self._journal.events.sum_up()
        return self._report()

    def _look(self, settled: bool) -> None:
        self._scan.look()
        record = self._store.current()
        wanted = self._wanted(record, settled)
        with self._store.lock(LOCK) if wanted else contextlib.nullcontext():
            if wanted:  # the lock kept other watchers out: only now is it known who was killed
                self._recollect()
                left_alone = self._memory.left_alone()
                wanted = {d: path for d, path in wanted.items() if d not in left_alone}
            if wanted or record.counter != self._generation:
                self._open_and_apply(record, wanted, settled)

    def _wanted(self, record: Generation, settled: bool) -> dict[str, Path]:
        """The packets in the folder that are to be tried now, by digest."""
        found = {
            digest: path
            for path in self._in_time(self._scan.steady(settled), settled)
            if (digest := self._scan.digest(path))
        }
        here = self._scan.digests
        self._verdicts = {d: verdict for d, verdict in self._verdicts.items() if d in here}
        plan = policy.plan(found, self._situation(record))
        if plan.repairing:
            self._verdicts = policy.for_good(self._verdicts)
        return {digest: found[digest] for digest in plan.digests}

    def _situation(self, record: Generation) -> policy.Situation:
        return policy.Situation(
            damaged=self._damaged_among(record.digests),  # may reset self._generation
            generation=record.counter,
            keys=self._keys,
            held=frozenset(record.digests),
            left_alone=self._memory.left_alone(),
            verdicts=self._verdicts,
        )

    def _in_time(self, items: Iterable[T], bounded: bool) -> Iterator[T]:
        """One after the other, until it is time to stop.

        systemd hears of each that takes long. More messages would fill its queue.
        """
        end = (told := time.monotonic()) + LOOK
        for item in items:
            if self._stopped or (bounded and told > end):
                return
            yield item
            if (clock := time.monotonic()) - told >= 1:
                notify("WATCHDOG=1")
                told = clock

    def _damaged_among(self, digests: Iterable[str]) -> frozenset[str]:
        """The packets in force whose files are damaged. To know, all are read, once a HEARTBEAT."""
        if time.monotonic() - self._proved >= HEARTBEAT:
            self._damaged = frozenset(self._store.damaged(digests))
            self._proved = time.monotonic()
            if self._damaged and not self._served.damage:
                self._generation = -1  # open the device again: its status must say so
        return self._damaged

    def _open_and_apply(self, record: Generation, wanted: dict[str, Path], bounded: bool) -> None:
        device = self._opens()
        self._note_served(device.status())
        self._generation = record.counter
        ordered = self._in_order(device, wanted, bounded)
        for begin in range(0, len(ordered), TOGETHER):
            self._try_all(device, ordered[begin : begin + TOGETHER])
        self._damaged = frozenset()
        self._proved = -math.inf if self._served.damage else time.monotonic()

    def _note_served(self, status: Status) -> None:
        self._keys = status.trust_version
        self._served = Served(
            **{field.name: getattr(status, field.name) for field in fields(Served)}
        )

    def _in_order(
        self, device: Device, wanted: dict[str, Path], bounded: bool
    ) -> list[tuple[str, Path]]:
        """The packets whose signatures hold, in the order in which they can follow each other."""
        record, trust, found = self._store.current(), device.trust, []
        named = [*(digest for digest, _ in record.trust), *record.packets]
        for digest, path in self._in_time(wanted.items(), bounded):
            if (data := self._scan.still(path, digest)) is None:
                continue
            try:
                found.append((policy.rank(data, digest, named, trust), digest, path))
            except (MemoryError, ResourceError) as error:
                self._journal.trouble("unreadable", error, path)
            except SdloraError as error:
                self._verdicts[digest] = policy.unverified(error, trust.version)
                self._journal.refused("refused", path, error)
        return [(digest, path) for _, digest, path in sorted(found)]

    def _try_all(self, device: Device, ordered: list[tuple[str, Path]]) -> None:
        """Try packets as one, and then each that did not come into force alone.

        Only alone is it known which one fails, or kills the process, and it is remembered.
        """
        digests = [digest for digest, _ in ordered]
        done: set[Path] = set()
        if len(ordered) > 1 and not self._stopped and self._memory.may_go_together(digests):
            with self._memory.trying(digests):
                self._apply_all(device, ordered, done)
            notify("WATCHDOG=1")
        for digest, path in ordered:
            if path in done:
                self._verdicts[digest] = policy.NEVER
                continue
            if self._stopped:
                break
            if (verdict := self._try(device, digest, path)) is not None:
                self._verdicts[digest] = verdict
            notify("WATCHDOG=1")

    def _apply_all(self, device: Device, ordered: list[tuple[str, Path]], done: set[Path]) -> None:
        """Add the files that need no other try to `done`. Raises if no packet is at fault."""

        def told(one: AppliedPacket | SkippedPacket) -> None:
            done.add(one.file)
            if isinstance(one, AppliedPacket):
                self._journal.applied({"file": str(one.file), **_told(one)})

        try:
            device.apply_all([path for _, path in ordered], told=told)
        except (*UNWRITTEN, UsageError):
            raise
        except SdloraError:
            pass  # each packet alone says why
        finally:
            self._note_served(device.status())
            self._generation = self._store.current().counter

    def _try(self, device: Device, digest: str, path: Path) -> Verdict | None:
        """The verdict; None if the file has changed meanwhile.

        Raises if the packet is not at fault.
        """
        with self._memory.trying([digest]):
            return self._apply(device, digest, path)

    def _apply(self, device: Device, digest: str, path: Path) -> Verdict | None:
        try:
            done = device.apply(path)
        except (*UNWRITTEN, UsageError):
            raise
        except SdloraError as error:
            if self._scan.still(path, digest) is None:
                return None
            outcome = policy.outcome(error, self._generation)
            if outcome.event:
                self._journal.refused(outcome.event, path, error)
            if outcome.failed:
                self._memory.failed[digest] = None
            return outcome.verdict
        self._note_served(done)
        # by the store: if there is still damage, the device serves less than what is in force
        self._generation = self._store.current().counter
        self._journal.applied({"file": str(path), **_told(done)})
        return policy.NEVER

    def _recollect(self) -> None:
        try:
            self._memory.recollect()
        except UNWRITTEN:
            raise
        except HealthError as error:
            self._journal.counts["failed"] += 1
            self._journal.trouble("failed", error)
        except InputError as error:
            self._journal.trouble("forgotten", error)

    def _report(self) -> WatchReport:
        """Write the status file if anything has changed, or a HEARTBEAT has passed."""
        report = WatchReport(
            time="",
            running=not self._stopped,
            folder=self._scan.folder,
            store=self._store.path,
            device=self._served,
            files=self._scan.files,
            counts=self._journal.known_counts(),
            trouble=self._journal.first_trouble,
            last_error=self._journal.last_error,
        )
        text, clock = json.dumps(report.to_dict()), time.monotonic()
        report = replace(report, time=now())
        if self._status and (text != self._written[0] or clock - self._written[1] >= HEARTBEAT):
            try:
                atomic.write(self._status, json.dumps(report.to_dict(), indent=1).encode() + b"\n")
                self._written = text, clock
                self._journal.forget("status")
            except Exception as error:  # as in `look`
                self._journal.trouble("status", error)
        return report


def _told(done: Applied | AppliedPacket) -> dict[str, object]:
    """What the event of an applied packet says beside its file."""
    names = ("kind", "task", "task_name", "generation", "apply_ms", "canary_difference")
    return {name: getattr(done, name) for name in names}

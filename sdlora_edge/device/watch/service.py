"""`device watch`: packets applied as they appear in a folder, however they get there: a USB stick, MQTT, rsync, scp.

A file counts once two looks in a row find it unchanged, and then by its bytes alone: what its signature proves decides the
order in which packets are tried, never a name or a time. What becomes of one is remembered by its digest:

    applied, or nothing to do     for as long as it lies there
    refused, or out of order      until the device is in another generation: predecessors may have come
    not signed by trusted keys    until other keys are in force
    canary failed                 for ever, in the store: until a newer packet comes in its place
    process killed while at it    counted, in the store: from the third time on it is left alone until the machine has started
                                  anew, or for an hour; for twice as long each time after that, up to a day
    disk full, store locked, ...  not at all: it is tried again, ever less often

Nothing in the folder is ever changed. The model is loaded only while there is something to apply.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import (
    UNWRITTEN,
    HealthError,
    InputError,
    LimitError,
    NotForThisDevice,
    NothingToDo,
    ResourceError,
    SdloraError,
    TrustError,
    UsageError,
)
from ...formats.canonical import sha256
from ...formats.container import opened
from ...formats.control import Revocation, read_any
from ...formats.packet import LIMITS, SUFFIX, Packet
from ...formats.signing import Trust
from ...storage import atomic, disk
from ..device import IN_PLACE, Device
from ..store import Store
from .events import Emit, Events, notify, now, to_stderr
from .memory import Memory

LONGEST_WAIT = 300.0
"""seconds between two looks when the store cannot be written, at most"""
HEARTBEAT = 60.0
"""seconds after which the status file is written anew though nothing has happened"""
LOOK = 30.0
"""seconds after which a look begins to read, or to verify, no further file: the next one goes on from there"""
Verdict = tuple[str, int]
"""what a packet was refused in: it is tried again in another ("generation", counter), or with other ("keys", version)"""
NEVER: Verdict = "any", 0
Stamp = tuple[int, int, int, int]
"""inode, bytes, time of change of bytes and of attributes: a file with the same stamp is not read again"""
SHORTEST, LONGEST = 0.01, 86_400.0
"""seconds that may be asked for between two looks"""


class Watcher:
    """One folder and one store. Errors of packets, folder and disk become events; only a store that is none raises."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        status: Path | None = None,
        emit: Emit = to_stderr,
        threads: int = 0,
    ) -> None:
        """status: the JSON file to keep. threads: of the engine. Raises InputError where `store` is no store."""
        self._folder, self._store, self._status, self._threads = (
            folder,
            Store(store),
            status,
            threads,
        )
        self._events = Events(emit)
        self._stopped = False
        self._wake: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # a signal handler would wait for the lock of an Event
        self._paths: dict[
            str, Path
        ] = {}  # kept: a hundred thousand new ones take a second to compare
        self._stamps: dict[Path, Stamp | None] = {}
        """of every packet in the folder; None for what is there and is no file to read"""
        self._digests: dict[Path, tuple[Stamp, str]] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._counts: Counter[str] = Counter()
        self._said: dict[object, str] = {}
        self._memory = Memory(self._store)
        self._troubles = 0
        self._device: dict[str, Any] = {}
        """its status, when it was last open"""
        self._generation = -1
        """in force then"""
        self._damaged, self._proved = set[str](), time.monotonic()
        """packets in force that are damaged, and when that was last looked for"""
        self._last_error: dict[str, Any] | None = None
        self._written: tuple[str, float] = "", 0.0

    def stop(self) -> None:
        """Make `run` return before the next packet. May be called by a signal handler, or another thread."""
        self._stopped = True
        self._wake.put(None)

    def run(self, interval: float) -> None:
        """Look every `interval` seconds, until `stop`. Raises UsageError for an interval that is none."""
        if not SHORTEST <= interval <= LONGEST:
            raise UsageError(
                f"an interval of {interval:g} s: give seconds between {SHORTEST:g} and {LONGEST:g}"
            )
        self._events.tell("started", {"folder": str(self._folder), "store": str(self._store.path)})
        while not self._stopped:
            self.look()
            notify("READY=1\nWATCHDOG=1")
            with contextlib.suppress(queue.Empty):
                self._wake.get(
                    timeout=min(interval * 2**self._troubles, max(interval, LONGEST_WAIT))
                )
        notify("STOPPING=1")
        self._report()
        self._events.tell("stopped", dict(self._counts))

    def look(self, settled: bool = True) -> dict[str, Any]:
        """One look at the folder: apply what can be applied, and return what the status file holds.

        settled: leave a file alone that has changed since the look before, and what takes longer than LOOK to the next one.
        """
        try:
            self._look(settled)
            self._troubles = 0
            self._say("trouble", "")
        except (
            Exception
        ) as error:  # whatever it was, the next look may go better, and the device serves meanwhile
            self._troubles = min(self._troubles + 1, 30)
            self._trouble("trouble", error)
        self._events.sum_up()
        return self._report()

    def _look(self, settled: bool) -> None:
        before, self._stamps = self._stamps, self._stamps_now()
        self._digests = {
            path: known for path, known in self._digests.items() if path in self._stamps
        }
        self._said = {
            key: text
            for key, text in self._said.items()
            if not isinstance(key, Path) or key in self._stamps
        }
        steady = [
            path
            for path, stamp in self._stamps.items()
            if stamp and (not settled or before.get(path) == stamp)
        ]
        generation = self._store.current()
        steady.sort(
            key=lambda path: bool(self._said.get(path))
        )  # what could not be read keeps nothing else from its turn
        found = {
            digest: path
            for path in self._in_time(steady, settled)
            if (digest := self._digest(path))
        }
        here = {digest for _, digest in self._digests.values()}
        self._verdicts = {
            digest: verdict for digest, verdict in self._verdicts.items() if digest in here
        }
        # a packet that the store holds is applied; where one is damaged there, its file here may repair it
        damaged = self._damaged_among(generation.digests)
        now = (
            NEVER,
            ("generation", generation.counter),
            ("keys", self._device.get("trust_version")),
        )
        decided = {digest for digest, verdict in self._verdicts.items() if verdict in now}
        decided -= {digest for digest in damaged if self._verdicts.get(digest) == NEVER}
        decided |= {*self._memory.left_alone(), *(set(generation.digests) - damaged)}
        candidates = {digest: path for digest, path in found.items() if digest not in decided}
        if repairing := {
            digest: path for digest, path in candidates.items() if digest in generation.digests
        }:
            candidates = repairing  # first: only then is it known who may sign the others, and what they may follow
            self._verdicts = {
                digest: verdict for digest, verdict in self._verdicts.items() if verdict == NEVER
            }
        with (
            self._store.lock("watch.lock") if candidates else contextlib.nullcontext()
        ):  # another watch may be at it
            if candidates:
                self._recollect()
                left_alone = self._memory.left_alone()
                candidates = {
                    digest: path for digest, path in candidates.items() if digest not in left_alone
                }
            if candidates or generation.counter != self._generation:
                device = Device.open(self._store.path, self._threads, swap=IN_PLACE)
                self._device, self._generation = device.status().to_dict(), generation.counter
                self._apply(device, candidates, settled)
                self._damaged, self._proved = (
                    set(),
                    -math.inf if self._device["damage"] else time.monotonic(),
                )

    def _in_time(self, paths: Iterable[Any], bounded: bool) -> Iterator[Any]:
        """One after the other, until it is time to stop. systemd hears of each that takes long: more would fill its queue."""
        end = (told := time.monotonic()) + LOOK
        for path in paths:
            if self._stopped or (bounded and told > end):
                return
            yield path
            if (clock := time.monotonic()) - told >= 1:
                notify("WATCHDOG=1")
                told = clock

    def _damaged_among(self, digests: Iterable[str]) -> set[str]:
        """Those of the packets in force whose files are damaged: they are all read for this, now and then."""
        if time.monotonic() - self._proved >= HEARTBEAT:
            self._damaged, self._proved = set(self._store.damaged(digests)), time.monotonic()
            if self._damaged and not self._device.get("damage"):
                self._generation = -1  # open it anew: the status must say so
        return self._damaged

    def _stamps_now(self) -> dict[Path, Stamp | None]:
        """The packets in the folder; none if it is missing, as a USB stick's folder often is."""
        names = []
        try:
            with os.scandir(self._folder) as entries:
                names = sorted(
                    e.name
                    for e in entries
                    if e.name.endswith(SUFFIX) and not e.name.startswith(".")
                )
            self._say("folder", "")
        except OSError as error:
            self._trouble("folder", InputError(f"{self._folder}: {error.strerror or error}"))
        self._paths = {name: self._paths.get(name) or self._folder / name for name in names}
        return {path: self._stamp(path) for path in self._paths.values()}

    def _stamp(self, path: Path) -> Stamp | None:
        """None for what is no file, which is said once: one bad link does not hide what lies beside it."""
        try:
            s = path.stat()
            if stat.S_ISREG(s.st_mode):
                return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
            problem = "not a file: remove it"
        except OSError as error:
            problem = error.strerror or str(error)
        if os.path.lexists(path):  # else it has gone meanwhile
            self._trouble("unreadable", InputError(f"{path}: {problem}"), path)
        return None

    def _digest(self, path: Path) -> str | None:
        """Of the file's bytes, read once for each stamp; None where it cannot be read, or is too large."""
        if (stamp := self._stamps[path]) is None:
            return None
        if path not in self._digests or self._digests[path][0] != stamp:
            digest = ""
            try:
                if stamp[1] > LIMITS.packet or self._has_header(path):
                    digest = sha256(atomic.receive(path, LIMITS.packet))
                self._said.pop(path, None)
            except LimitError as error:
                self._refuse("refused", path, error)
            except (
                InputError,
                MemoryError,
                ResourceError,
            ) as error:  # tried again at every look, reported once
                self._trouble("unreadable", error, path)
                return None
            self._digests[path] = stamp, digest
        return self._digests[path][1] or None

    def _has_header(self, path: Path) -> bool:
        """What has none is no packet, and is not read any further, however much of it there is."""
        with atomic.reading(path):
            begin = b"".join(islice(disk.read(path), 1 + -(-LIMITS.header // disk.CHUNK)))
        try:
            opened(begin)
        except InputError as error:
            self._refuse("refused", path, error)
            return False
        return True

    def _apply(self, device: Device, candidates: dict[str, Path], bounded: bool) -> None:
        """Try them in order."""
        for digest, path in self._in_order(device.trust, candidates, bounded):
            if self._stopped:
                return
            if (verdict := self._try(device, digest, path)) is not None:
                self._verdicts[digest] = verdict
            notify("WATCHDOG=1")

    def _in_order(
        self, trust: Trust, candidates: dict[str, Path], bounded: bool
    ) -> list[tuple[str, Path]]:
        """Those whose signatures hold, in the order in which they can follow each other; before them, keys first, what the store
        names already: its bytes prove it, whoever signs now."""
        record, found = self._store.current(), []
        named = [*(digest for digest, _ in record.trust), *record.packets]
        for digest, path in self._in_time(candidates.items(), bounded):
            if (data := self._still(path, digest)) is None:
                continue
            try:
                rank = (-1, named.index(digest)) if digest in named else _rank(data, trust)
                found.append((rank, digest, path))
            except (MemoryError, ResourceError) as error:
                self._trouble("unreadable", error, path)
            except SdloraError as error:
                # other keys may come; a damaged file stays damaged
                self._verdicts[digest] = (
                    ("keys", trust.version) if isinstance(error, TrustError) else NEVER
                )
                self._refuse("refused", path, error)
        return [(digest, path) for _, digest, path in sorted(found)]

    def _still(self, path: Path, digest: str) -> bytes | None:
        """The file's bytes, unless it has changed since, or is gone with the stick it was on: then the next look reads it anew."""
        try:
            data = atomic.receive(path, LIMITS.packet)
        except (InputError, MemoryError, ResourceError):
            data = b""
        if sha256(data) == digest:
            return data
        self._digests.pop(path, None)
        return None

    def _try(self, device: Device, digest: str, path: Path) -> Verdict | None:
        """The verdict; None where the file has changed meanwhile. Raises what is no fault of the packet."""
        self._memory.write(trying=digest)
        try:
            return self._apply_one(device, digest, path)
        finally:  # not where the process is killed
            self._memory.tried(digest)

    def _apply_one(self, device: Device, digest: str, path: Path) -> Verdict | None:
        try:
            self._device = device.apply(path).to_dict()
        except (*UNWRITTEN, UsageError):
            raise
        except SdloraError as error:
            if self._still(path, digest) is None:
                return None
            if isinstance(error, NothingToDo):
                return NEVER
            if isinstance(error, HealthError):
                self._refuse("failed", path, error)
                self._memory.failed[digest] = None
                return NEVER
            self._refuse(
                "waiting" if isinstance(error, NotForThisDevice) else "refused", path, error
            )
            return "generation", self._generation
        now = self._device
        self._generation = (
            self._store.current().counter
        )  # not what is served of it, where there is damage still
        facts = {
            key: now[key]
            for key in ("kind", "task", "task_name", "generation", "apply_ms", "canary_difference")
        }
        self._counts["applied"] += 1
        self._events.tell("applied", {"file": str(path), **facts})
        return NEVER

    def _recollect(self) -> None:
        try:
            self._memory.recollect()
        except UNWRITTEN:
            raise
        except HealthError as error:
            self._counts["failed"] += 1
            self._trouble("failed", error)
        except InputError as error:
            self._trouble("forgotten", error)

    def _refuse(self, event: str, path: Path, error: SdloraError) -> None:
        self._counts[event] += 1
        self._note(error, path)
        tell = self._events.tell if event == "failed" else self._events.tell_of_file
        tell(event, {"file": str(path), "error": str(error), "exit_code": error.exit_code})

    def _trouble(self, event: str, error: Exception, path: Path | None = None) -> None:
        """What does not go away by itself is said once."""
        text = str(error) if isinstance(error, SdloraError) else repr(error)
        if self._say(path or event, text):
            self._note(error, path)
            fields = {"error": text, "exit_code": getattr(error, "exit_code", 1)}
            if path is None:
                self._events.tell(event, fields)
            else:
                self._events.tell_of_file(event, {"file": str(path), **fields})

    def _say(self, key: object, text: str) -> bool:
        """Whether `text` is news; an end of trouble is an event of its own."""
        before, self._said[key] = self._said.get(key, ""), text
        if before and not text:
            self._events.tell("recovered", {"from": before})
        return text != before

    def _note(self, error: Exception, path: Path | None) -> None:
        text = str(error) if isinstance(error, SdloraError) else repr(error)
        code = getattr(error, "exit_code", 1)
        self._last_error = {
            "time": now(),
            "file": path and str(path),
            "error": text,
            "exit_code": code,
        }

    def _report(self) -> dict[str, Any]:
        """Write the status file, where anything has changed or a minute has passed."""
        shown = (
            "generation",
            "task",
            "task_name",
            "classes",
            "state",
            "lineage",
            "bundle",
            "store_bytes",
            "damage",
        )
        value = {
            "running": not self._stopped,
            "folder": str(self._folder),
            "store": str(self._store.path),
            **{key: self._device.get(key) for key in shown},
            "files": sum(stamp is not None for stamp in self._stamps.values()),
            "counts": {
                key: self._counts[key] for key in ("applied", "waiting", "refused", "failed")
            },
            "trouble": next((text for key, text in self._said.items() if text), None),
            "last_error": self._last_error,
        }
        text, clock = json.dumps(value), time.monotonic()
        report = {"time": now(), **value}
        if self._status and (text != self._written[0] or clock - self._written[1] >= HEARTBEAT):
            try:
                atomic.write(self._status, json.dumps(report, indent=1).encode() + b"\n")
                self._written = text, clock
                self._said.pop("status", None)
            except Exception as error:  # as in `look`
                self._trouble("status", error)
        return report


def _rank(data: bytes, trust: Trust) -> tuple[int, ...]:
    """Where a packet stands in the order of trying, smaller first: other keys, revocations, and updates in their order.

    Keys come first: what a retired key signed may be forged. Raises InputError, LimitError, TrustError.
    """
    found = read_any(data, trust)
    if isinstance(found, Packet):
        return 2, found.revision, found.sequence
    return (1,) if isinstance(found, Revocation) else (0, found.trust.version)

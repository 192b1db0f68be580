"""A device's directory, and the commit point of an update.

    bundle/              what the device was flashed with, never changed
    packets/<sha256>     applied packets (of tasks and of keys), never changed, named by digest
    generation.0.json    the record of the generation in force, twice (`records.Generation`).
    generation.1.json    The CONFIRMED record with the highest counter is in force.
    engine/              the engine's own files, for other programs
    *.lock               empty files, held while something is written; readers take none

Modes do not depend on the umask: folders are 0700, files 0600. The members of a group to share with
(`create`) may read and no more: then folders are 2750, files 0640. Locks are always 0600. A file
that is added later is as readable as its folder.

A record is replaced by rename, so a power cut leaves the old one or the new one. While a new
generation is made, one of the two records is PENDING and holds a copy of the one in force. The
rename that makes it CONFIRMED is the commit. Then the other record becomes its copy. So either
record may be damaged at any time, and nothing is forgotten. Weights are never stored: they are
computed from bundle and packets. docs/adr/ has the reasons.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import UNWRITTEN, InputError, LimitError, UsageError
from ..formats.bundle import MANIFEST, Bundle
from ..formats.canonical import sha256
from ..formats.limits import LIMITS
from ..storage import atomic, disk
from .records import CONFIRMED, FAILED, PENDING, RECORD_LIMIT, Generation

log = logging.getLogger(__name__)

_RECORDS = ("generation.0.json", "generation.1.json")
MEMORY = "watch.json"
"""what a watcher remembers, written under a lock of its own"""


class Store:
    """The files of one store. Raises InputError if `path` is no store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace = path / "engine"
        """the engine's own folder"""
        with atomic.reading(path):
            found = disk.size(path / "bundle" / MANIFEST)
        if found is None:
            raise InputError(
                f"{path} is not a store: "
                f"make one with sdlora-edge device init --bundle BUNDLE --store {path}"
            )
        atomic.refuse_links(path, path / "bundle", path / "packets")

    @classmethod
    def create(
        cls, path: Path, bundle: Bundle, prove: Callable[[Path], object], group: str | None = None
    ) -> Store:
        """Make a store with a copy of the bundle, in the bundle's own state.

        Args:
            path: The new folder.
            bundle: An opened bundle.
            prove: Called with the store under a temporary name; it gets its own name if this raises
                nothing.
            group: Name or number of a group whose members may read the store.

        Raises:
            UsageError: `path` exists, or the group does not.
        """
        shared = None if group is None else _group(group)
        with atomic.new_folder(path, 0o700) as folder:
            if shared is not None:
                _share(folder, shared)
            disk.mkdir(folder / "bundle", like=folder)
            for name in [MANIFEST, *bundle.manifest.files]:
                atomic.copy(bundle.path / name, folder / "bundle" / name)
            disk.sync(folder / "bundle")
            disk.mkdir(folder / "packets", like=folder)
            first = Generation(
                1, CONFIRMED, (), bundle.manifest.task, bundle.manifest.revision, bundle=bundle.id
            )
            for slot in (0, 1):  # both, so that either may be damaged
                _write_record(folder / _RECORDS[slot], first)
            prove(folder)
        return cls(path)

    @contextlib.contextmanager
    def lock(self, name: str = "apply.lock", wait: float = 0.0) -> Iterator[None]:
        """Let one process write at a time.

        The operating system frees the lock of a process that dies.

        Args:
            name: File name of the lock.
            wait: Seconds to wait for another process.

        Raises:
            UsageError: Another process still holds the lock.
            StorageError: The store cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(disk.lock(self.path / name, wait))
                # A killed process may have renamed a record without syncing its folder. What
                # follows builds on that record, so its name must survive before anything new does.
                atomic.keep_name(self.path)
                disk.sync(self.path / "packets")
                disk.sync(self.path)
            except BlockingIOError as error:
                raise UsageError(
                    f"{self.path} is being updated by another process: try again when it is done"
                ) from error
            except OSError as error:
                raise atomic.unwritten(self.path, error) from error
            yield

    def current(self) -> Generation:
        """The generation in force.

        Raises InputError if a record cannot be read, or both are damaged.
        """
        intact = [g for g in self.records().values() if g is not None]
        if confirmed := [g for g in intact if g.status == CONFIRMED]:
            return max(confirmed, key=lambda g: g.counter)
        for record in intact:
            if (
                record.before is not None
            ):  # the confirmed record is damaged; this one holds its copy
                return record.before
        raise InputError(
            f"{self.path} holds no intact generation record: "
            "flash the device again with sdlora-edge device init"
        )

    def records(self) -> dict[Path, Generation | None]:
        """Both records; None for one that is missing or damaged.

        Raises InputError if the disk does not answer.
        """
        found = {self.path / name: _read_record(self.path / name) for name in _RECORDS}
        # Readers take no lock, and a writer may commit twice between the two reads. So read until
        # nothing changes.
        for _ in range(100):
            before, found = found, {path: _read_record(path) for path in found}
            if found == before:
                break
        return found

    def named(self) -> list[Generation]:
        """Every generation that an intact record holds."""
        intact = [record for record in self.records().values() if record is not None]
        return intact + [record.before for record in intact if record.before is not None]

    def damage(self) -> list[str]:
        """A line for each record that is missing or damaged.

        The other one is in force, and the next update repairs it.
        """
        return [
            f"{path} is missing or damaged: the other record is used"
            for path, record in self.records().items()
            if record is None
        ]

    def leftovers(self) -> list[Path]:
        """Files that no record names: packets of failed generations, and half-written files.

        Raises InputError.
        """
        kept = {digest for record in self.named() for digest in record.digests}
        with atomic.reading(self.path):
            packets = [
                self._packet(name) for name in disk.names(self.path / "packets") if name not in kept
            ]
            cut = [name for name in disk.names(self.path) if name.startswith(atomic.TEMPORARY)]
            # A watcher may be writing its memory just now; its next write removes what is left of
            # that.
            return packets + [self.path / name for name in cut if name != atomic.TEMPORARY + MEMORY]

    def sweep(self) -> None:
        """Remove the leftovers. One that cannot be removed does no harm and stays."""
        for path in self.leftovers():
            with contextlib.suppress(OSError):
                atomic.remove(path)

    def add_packet(self, data: bytes) -> str:
        """Keep a verified packet under its digest, and read it back.

        Its bytes survive a power cut from now on, its name only after `keep_names`.
        """
        path = self._packet(digest := sha256(data))
        atomic.place(path, data, like=self.path)
        if atomic.read(path, LIMITS.packet) != data:
            self.packet(digest)  # reads it once more, and raises if it is damaged
        return digest

    def keep_names(self) -> None:
        """Make the names of all packets survive a power cut. Call it before a record names them.

        Raises StorageError, ResourceError.
        """
        try:
            disk.sync(self.path / "packets")
        except OSError as error:
            raise atomic.unwritten(self.path / "packets", error) from error

    def packet(self, digest: str) -> bytes:
        """The bytes of a packet. Raises InputError if they are no longer those of its name."""
        path = self._packet(digest)
        with contextlib.suppress(InputError):
            if sha256(data := atomic.read(path, LIMITS.packet)) == digest:
                return data
        data = atomic.read(path, LIMITS.packet)  # again: a disk may fail for a moment
        if sha256(data) != digest:
            raise InputError(f"{path} is damaged: apply this packet again")
        return data

    def damaged(self, digests: Iterable[str]) -> tuple[str, ...]:
        """Those of these packets whose files are damaged or missing."""
        found = []
        for digest in digests:
            try:
                self.packet(digest)
            except InputError:
                found.append(digest)
        return tuple(found)

    @contextlib.contextmanager
    def replacing(self, new: Generation) -> Iterator[Generation]:
        """The commit point.

        The new record is pending while the block runs, confirmed if it ends without an error, and
        failed otherwise. The old one is in force until a record says confirmed.

        Args:
            new: The record in force, changed. It gets the next counter.
        """
        old = self.current()
        pending = replace(new, counter=old.counter + 1, status=PENDING, before=old)
        path = self._spare()
        _write_record(path, pending)
        try:
            yield pending
        except BaseException:
            with contextlib.suppress(
                *UNWRITTEN
            ):  # a record that stays pending is not in force either
                _write_record(path, replace(pending, status=FAILED))
            raise
        try:
            _write_record(path, pending.confirmed())
        except UNWRITTEN as error:
            if self.current().counter != pending.counter:
                raise
            # The rename has been done, and what failed came after it: every process sees the new
            # generation.
            log.warning(
                "%s: in force, but a power cut may bring back the generation before it", error
            )
        # From here on the new generation is in force. The copy only protects against a record that
        # is damaged later.
        try:
            _write_record(self._other(path), pending.confirmed())
        except UNWRITTEN as error:
            log.warning(
                "%s: in force, but a damaged record would bring back the generation before it",
                error,
            )

    def _spare(self) -> Path:
        """The record to write next: a damaged one, else an unconfirmed one, else the older one.

        It is never the only intact record that says what is in force.
        """
        records = self.records()
        return min(
            records,
            key=lambda path: (
                (0,) if (r := records[path]) is None else (1, r.status == CONFIRMED, r.counter)
            ),
        )

    def _other(self, record: Path) -> Path:
        return next(path for name in _RECORDS if (path := self.path / name) != record)

    def _packet(self, digest: str) -> Path:
        return self.path / "packets" / digest

    def size(self) -> dict[str, int]:
        """Bytes on disk, by part."""
        found = {}
        for part in ("bundle", "packets"):
            folder = self.path / part
            with atomic.reading(folder):
                found[part] = sum(disk.size(folder / name) or 0 for name in disk.names(folder))
        return found


def store_around(path: Path) -> Path | None:
    """The store that a path is, or leads into, links followed; None if there is none."""
    real = Path(os.path.realpath(path))
    return next(
        (
            folder
            for folder in (real, *real.parents)
            if any(os.path.isfile(folder / name) for name in _RECORDS)
        ),
        None,
    )


def _group(name: str) -> int:
    """The number of a group. Raises UsageError."""
    try:
        number = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        raise UsageError(f"there is no group {name!r}: make it, or name another one") from error
    if number >= 2**32 - 1:  # the largest means "as it is" to the operating system
        raise UsageError(f"there is no group {name!r}: a group's number is below {2**32 - 1}")
    return number


def _share(folder: Path, group: int) -> None:
    try:
        disk.share(folder, group)
    except PermissionError as error:
        raise UsageError(
            f"this user may not share files with group {group}: "
            "join that group, or run this as root"
        ) from error


def _write_record(path: Path, record: Generation) -> None:
    """Raises StorageError, ResourceError, or LimitError if no reader would accept it."""
    if len(data := record.to_json()) > RECORD_LIMIT:
        raise LimitError(
            f"a generation record of {len(data)} bytes exceeds {RECORD_LIMIT}: "
            "flash this device with a newer bundle"
        )
    atomic.write(path, data, like=path.parent)


def _read_record(path: Path) -> Generation | None:
    with atomic.reading(path):
        missing = disk.size(path) is None
    if missing:
        return None
    try:
        data = atomic.read(path, RECORD_LIMIT)
    except LimitError:  # no device writes such a record: it is damaged
        return None
    try:
        return Generation.from_json(data)
    except (InputError, ValueError):
        return None

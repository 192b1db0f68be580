"""What a device trusts of its repository: TUF's files, kept in the store.

    fleet/trusted-root.json    what the device was given: never changed. Without it, the bundle's
                               own fleet-root.json counts
    fleet/root.json, timestamp.json, snapshot.json, targets.json, rollout.json

python-tuf verifies. It works in a scratch folder, because it syncs nothing. What became trusted is
written back file by file, root first. After a power cut the files may be of different times. Each
was trusted when it was written, and the client checks each against the one before: a file that does
not fit is fetched again. So damage costs a download. A timestamp is written back even if nothing
after it arrived, so an older one is refused from then on.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from tuf.api.exceptions import (
    DownloadError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater, UpdaterConfig

from ..errors import InputError, LinkError, TrustError
from ..formats.manifest import FLEET_ROOT
from ..storage import atomic, disk
from .fetching import Fetcher
from .rollout import Plan
from .targets import ROLLOUT_ROLE, ROLLOUTS, SIGNED_AT, Published, Target

ANCHOR = "trusted-root.json"
ROOT, TIMESTAMP = "root.json", "timestamp.json"
NAMES = (ROOT, TIMESTAMP, "snapshot.json", "targets.json", f"{ROLLOUT_ROLE}.json")
"""in the order in which they are written"""
LIMIT = 16 * 1024 * 1024
"""bytes of a file of metadata"""
TIMESTAMP_LIMIT, PLAN_LIMIT = 16 * 1024, 1024 * 1024
"""bytes. The online keys sign how long a plan is, and they may be stolen."""
CONFIG = UpdaterConfig(
    max_root_rotations=256,
    root_max_length=512 * 1024,
    timestamp_max_length=TIMESTAMP_LIMIT,
    snapshot_max_length=1024 * 1024,
    targets_max_length=LIMIT,
    app_user_agent="sdlora-edge",
)


@dataclass(frozen=True)
class Stamp:
    """What a trusted timestamp says. snapshot: version. signed_at: Unix seconds, or 0."""

    version: int
    snapshot: int
    signed_at: int
    expires: float


@dataclass
class View:
    """One consistent state of a repository, verified.

    Attributes:
        targets: Packets and bundles' manifests, as the offline role `targets` lists them.
        files: Every file that it lists, by path.
        snapshot: Version of the snapshot.
    """

    targets: list[Target]
    files: dict[str, TargetFile]
    snapshot: int
    _updater: Updater = field(repr=False)
    _fetcher: Fetcher = field(repr=False)
    _base: str = field(repr=False)
    _plans: dict[str, Plan] = field(default_factory=dict, repr=False)

    def plan(self, channel: str) -> Plan:
        """The roll-out of a channel, fetched once; an empty one if there is none.

        Raises LinkError, TrustError, InputError.
        """
        if channel not in self._plans:
            self._plans[channel] = self._plan(channel)
        return self._plans[channel]

    def _plan(self, channel: str) -> Plan:
        with told():
            found = self._updater.get_targetinfo(f"{ROLLOUTS}{channel}.json")
            if found is None or found.path in self.files:
                return Plan(channel)
            if found.length > PLAN_LIMIT:
                raise TrustError(
                    f"the roll-out of channel {channel} has {found.length} bytes, more than "
                    f"{PLAN_LIMIT}: prune its steps"
                )
            data = self._fetcher.download_bytes(self.url(found), found.length)
            found.verify_length_and_hashes(data)
        plan = Plan.from_json(data)
        if plan.channel != channel:
            raise TrustError(f"the roll-out of channel {channel} is one of {plan.channel[:80]}")
        return plan

    def url(self, file: TargetFile) -> str:
        """Where a target's bytes lie: with its digest in its name."""
        folder, slash, name = file.path.rpartition("/")
        return f"{self._base}targets/{folder}{slash}{file.hashes['sha256']}.{name}"


class TrustedMetadata:
    """TUF's files of one store.

    Args:
        store: The device's directory.
        url: Of the repository; `metadata/` and `targets/` are below it.
        fetcher: The link.
    """

    def __init__(self, store: Path, url: str, fetcher: Fetcher) -> None:
        self.folder = store / "fleet"
        self._store, self._fetcher = store, fetcher
        self._base = url.rstrip("/") + "/"

    def anchor(self, root: bytes) -> None:
        """Keep the root of trust that a person gave.

        If it is another one than before, all that was trusted through that is forgotten. That is
        done first: a power cut must not leave the new root of trust beside the old root.

        Raises:
            InputError: It is no root metadata.
            TrustError: Its own keys have not signed it.
        """
        with told():
            signed = Metadata[Root].from_bytes(root)
            if not isinstance(signed.signed, Root):
                raise InputError(
                    f"the root of trust is metadata of the role {signed.signed.type}: name the "
                    "repository's 1.root.json"
                )
            signed.signed.verify_delegate(Root.type, signed.signed_bytes, signed.signatures)
        with contextlib.suppress(InputError):
            if self._read(ANCHOR) == root:
                return
        try:
            for name in NAMES:
                if disk.size(self.folder / name) is not None:
                    disk.unlink(self.folder / name)
            if disk.size(self.folder) is not None:
                disk.sync(self.folder)
        except OSError as error:
            raise atomic.unwritten(self.folder, error) from error
        self._write(ANCHOR, root)

    def stamp(self) -> Stamp | None:
        """The timestamp that was trusted last. None if there is none, or other keys hold now.

        The time that it was signed at counts only as long as its keys do: whoever stole an old key
        may have put it far ahead.
        """
        with contextlib.suppress(InputError, RepositoryError):
            return _stamp(self._root(), self._read(TIMESTAMP))
        return None

    def look(self, clock: float) -> Stamp | None:
        """Fetch the timestamp alone: one request.

        None if it is not plainly as good as the one before: signed by the keys that are trusted
        now, not older, not expired. Then `refresh` has to say what is wrong.

        Raises LinkError.
        """
        url = f"{self._base}metadata/{TIMESTAMP}"
        with told():
            data = self._fetcher.download_bytes(url, TIMESTAMP_LIMIT)
        self._fetcher.hold(url, data)
        try:
            stamp = _stamp(self._root(), data)
        except (InputError, RepositoryError):
            return None
        before = self.stamp()
        if before is None or stamp.version < before.version or stamp.expires <= clock:
            return None
        if stamp.version > before.version and stamp.snapshot == before.snapshot:
            self._write(TIMESTAMP, data)
        return stamp

    def sweep(self) -> None:
        """Remove what a killed process has half written."""
        for name in (ANCHOR, *NAMES, "handled.json", "sync.json"):
            path = self.folder / f"{atomic.TEMPORARY}{name}"
            if disk.size(path) is not None:
                with contextlib.suppress(OSError):
                    disk.unlink(path)

    @contextlib.contextmanager
    def refresh(self, clock: float) -> Iterator[View]:
        """Follow the repository to its newest state, by TUF's client workflow.

        clock: Unix seconds, the time to compare expiries with.

        Raises:
            LinkError: The repository cannot be reached.
            TrustError: Something is not signed as it must be, is older than what this device has
                seen, or has expired.
        """
        with tempfile.TemporaryDirectory(dir=atomic.temporary()) as scratch:
            for name in NAMES[1:]:
                with contextlib.suppress(InputError):
                    (Path(scratch) / name).write_bytes(self._read(name))
            try:
                with told():
                    updater = self._updater(scratch)
                    # The clock of a device may be wrong: see `client`.
                    updater._trusted_set.reference_time = datetime.fromtimestamp(
                        clock, timezone.utc
                    )
                    updater.refresh()
                    listed = (Path(scratch) / "targets.json").read_bytes()
                # before anything is done that follows from it: a cut must not leave the deed alone
                self._keep(Path(scratch))
                yield self._view(updater, listed)
            finally:
                self._keep(Path(scratch))

    def _view(self, updater: Updater, listed: bytes) -> View:
        files = Metadata[Targets].from_bytes(listed).signed.targets
        for path, file in files.items():
            if "sha256" not in file.hashes:
                raise InputError(f"target {path[:200]} has no SHA-256: publish it again")
        targets = [
            Target(path, file.length, file.hashes["sha256"], Published.from_custom(file.custom))
            for path, file in files.items()
            if file.custom is not None
        ]
        snapshot = updater._trusted_set.timestamp.snapshot_meta.version
        return View(targets, dict(files), snapshot, updater, self._fetcher, self._base)

    def _root(self) -> Root:
        """The newest root that is kept. Raises InputError, RepositoryError."""
        found = Metadata[Root].from_bytes(self._read(ROOT)).signed
        if not isinstance(found, Root):
            raise InputError(f"{self.folder / ROOT} is damaged")
        return found

    def _updater(self, scratch: str) -> Updater:
        """With the newest root that is kept, or from the first one on if that is damaged."""
        for name in (ROOT, ANCHOR):
            try:
                return Updater(
                    scratch,
                    f"{self._base}metadata/",
                    fetcher=self._fetcher,
                    config=CONFIG,
                    bootstrap=self._read(name),
                )
            except (InputError, RepositoryError):
                if name == ANCHOR:
                    raise
        raise AssertionError

    def _keep(self, scratch: Path) -> None:
        """Write back what became trusted."""
        for name in NAMES:
            with contextlib.suppress(OSError):
                data = (scratch / name).read_bytes()
                try:
                    same = self._read(name) == data
                except InputError:
                    same = False
                if not same:
                    self._write(name, data)

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        if name == ANCHOR and disk.size(path) is None:
            path = self._store / "bundle" / FLEET_ROOT  # what a person gave goes before it
            if disk.size(path) is None:
                raise InputError(
                    f"{self._store} has no root of trust for a repository: give it one with "
                    "sdlora-edge device sync --root FILE, or export bundles with --fleet-root"
                )
        return atomic.read(path, LIMIT)

    def _write(self, name: str, data: bytes) -> None:
        atomic.write(self.folder / name, data, like=self._store)


def _stamp(root: Root, data: bytes) -> Stamp:
    """Read a timestamp. Raises RepositoryError unless a root's keys have signed it."""
    found = Metadata[Timestamp].from_bytes(data)
    root.verify_delegate(Timestamp.type, found.signed_bytes, found.signatures)
    signed = found.signed
    if not isinstance(signed, Timestamp):  # one key may sign for several roles
        raise RepositoryError(f"a timestamp is metadata of the role {signed.type}")
    expires = signed.expires.timestamp()
    at = signed.unrecognized_fields.get(SIGNED_AT, 0)
    sound = type(at) is int and 0 <= at <= expires
    return Stamp(signed.version, signed.snapshot_meta.version, at if sound else 0, expires)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn errors of TUF and of the link into ours."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise Expired(
            f"the repository's metadata has expired ({error}): nothing new is taken; run "
            "sdlora-edge fleet refresh on the host, or set this device's clock"
        ) from error
    except LengthOrHashMismatchError as error:
        raise TrustError(f"the repository is not what it says: {error}") from error
    except RepositoryError as error:
        raise TrustError(f"the repository's metadata is refused: {error}") from error
    except DownloadError as error:
        failed = LinkError(f"the repository cannot be read: {error}")
        failed.retry_after = getattr(error, "retry_after", None)
        raise failed from error


class Expired(TrustError):
    """The repository's metadata has expired."""

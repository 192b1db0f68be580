"""The signed metadata of a fleet repository: The Update Framework's roles, their files and keys.

    metadata/N.root.json        who may sign for each role          offline, kept for ever
    metadata/N.targets.json     the published files                 offline
    metadata/N.rollout.json     the roll-out plans                  online, delegated by `targets`
    metadata/N.snapshot.json    the version of each of these        online
    metadata/timestamp.json     the newest snapshot                 online
    staged/root.json            waits for more signatures; no web server needs to serve it
    staged/targets.json

This is the one place that reads and signs them. What it reads is verified from the first root on,
so nobody signs what somebody else has put into the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import InputError, TrustError, UsageError
from ..storage import atomic
from .extras import need
from .targets import ROLLOUT_ROLE, SIGNED_AT

try:
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import (
        DelegatedRole,
        Delegations,
        Metadata,
        MetaFile,
        Root,
        Signed,
        Snapshot,
        TargetFile,
        Targets,
        Timestamp,
    )
    from tuf.api.serialization import DeserializationError
except ModuleNotFoundError:
    need("tuf.api.metadata", "fleet")
    raise

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = [
    "DelegatedRole",
    "Delegations",
    "MetaFile",
    "Metadata",
    "Root",
    "Signed",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
]
ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
OFFLINE = (ROOT, TARGETS)
ONLINE = (ROLLOUT_ROLE, SNAPSHOT, TIMESTAMP)
ROLES = (*OFFLINE, *ONLINE)
DAYS = {ROOT: 365, TARGETS: 365, ROLLOUT_ROLE: 90, SNAPSHOT: 30, TIMESTAMP: 14}
"""For how long a signature counts, unless chosen otherwise. `refresh` runs daily. If it stops for a
week, devices still take updates; if someone holds old files back, devices notice within a
fortnight."""
DAY = 24 * 60 * 60
SLACK = 300
"""seconds by which the clocks of two machines that sign may differ"""
LIFETIME = "x-sdlora-days"
"""Field of every signed part: days after which it expires."""
ROOT_VERSION = "x-sdlora-root"
"""Field of the snapshot's signed part: version of the newest root. So a device that looks at the
timestamp alone learns of new keys."""
LARGEST = 64 * 1024 * 1024
"""bytes of a metadata file"""
T = TypeVar("T", Root, Targets, Snapshot, Timestamp)


class SignedFile(Generic[T]):
    """One metadata file: its content, and its bytes as they lie on disk."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        try:
            self.metadata: Metadata[T] = Metadata.from_bytes(data)
        except DeserializationError as error:
            raise InputError(
                f"{path} is damaged: restore the repository's folder from a copy ({error})"
            ) from error

    @property
    def signed(self) -> T:
        """What was signed."""
        return self.metadata.signed

    @property
    def entry(self) -> MetaFile:
        """What the file that names it says of it."""
        return MetaFile.from_data(self.signed.version, self.data, ["sha256"])


class Roles:
    """The metadata of one repository.

    Args:
        path: The repository's folder.
        clock: Gives Unix seconds.
        pinned: The first root, if it is known from elsewhere.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.time, pinned: bytes | None = None
    ) -> None:
        self.folder, self.staging = path / "metadata", path / "staged"
        self.clock, self._pinned = clock, pinned

    def root(self) -> SignedFile[Root]:
        """The newest root. Each root is verified with the keys of the one before it.

        Raises:
            InputError: A file is missing or damaged.
            TrustError: Signatures are missing, or the first root is another one.
        """
        found: SignedFile[Root] | None = None
        for version in self.versions(ROOT) or [1]:
            one: SignedFile[Root] = self.read(self.folder / f"{version}.root.json")
            before = found or one
            if found is None and (version != 1 or self._pinned not in (None, one.data)):
                raise TrustError(
                    f"{one.path} is not the root that this repository began with: restore the "
                    "repository's folder from a copy"
                )
            if one.signed.version != version or version != before.signed.version + bool(found):
                raise TrustError(f"{one.path} holds version {one.signed.version}: restore it")
            self._require(ROOT, before.signed, one)
            self._require(ROOT, one.signed, one)
            found = one
        assert found
        return found

    def targets(self) -> SignedFile[Targets]:
        """The newest metadata of the published files."""
        return self._newest(TARGETS, self.root().signed)

    def rollout(self) -> SignedFile[Targets]:
        """The newest metadata of the plans."""
        return self._newest(ROLLOUT_ROLE, self.targets().signed)

    def snapshot(self) -> SignedFile[Snapshot] | None:
        """The newest snapshot. None if there is none that the newest root's keys have signed."""
        return self._if_signed(SNAPSHOT)

    def timestamp(self) -> SignedFile[Timestamp] | None:
        """The same for the timestamp."""
        return self._if_signed(TIMESTAMP)

    def staged(self, role: str) -> SignedFile[Any] | None:
        """Metadata that waits for more signatures. What is in force already does not count."""
        path = self.staging / f"{role}.json"
        found = self.read(path) if path.exists() else None
        return found if found and found.signed.version > self.last_version(role) else None

    def newest_unverified(self, role: str) -> SignedFile[Any]:
        """The newest version that was written. Its signatures are not verified."""
        return self.read(self.path(role, self.last_version(role)))

    def last_version(self, role: str) -> int:
        """The newest version of a role that was ever written, verified or not."""
        if role == TIMESTAMP:
            path = self.path(TIMESTAMP, 0)
            return self.read(path).signed.version if path.exists() else 0
        return max(self.versions(role), default=0)

    def versions(self, role: str) -> list[int]:
        """The versions of a role's files, ascending."""
        ending = f".{role}.json"
        found = self.folder.glob(f"*{ending}") if self.folder.is_dir() else ()
        numbers = (path.name.removesuffix(ending) for path in found)
        return sorted(int(number) for number in numbers if number.isdigit())

    def path(self, role: str, version: int) -> Path:
        """The file of a role's version."""
        return self.folder / ("timestamp.json" if role == TIMESTAMP else f"{version}.{role}.json")

    def delegator(self, role: str) -> Root | Targets:
        """What names the keys of a role."""
        return self.targets().signed if role == ROLLOUT_ROLE else self.root().signed

    def keyids(self, role: str) -> set[str]:
        """The keys that sign for a role now, or will once staged metadata is complete."""
        owner = TARGETS if role == ROLLOUT_ROLE else ROOT
        waiting = self.staged(owner)
        delegators = [self.delegator(role), *([waiting.signed] if waiting else [])]
        return {k for one in delegators for k in one.get_delegated_role(role).keyids}

    def sign(
        self, role: str, signed: T, signers: Sequence[CryptoSigner], days: int | None = None
    ) -> Metadata[T]:
        """Sign a role's metadata, with a new expiry.

        days: Until it expires. Default: as many as before.
        """
        lifetime = days or signed.unrecognized_fields.get(LIFETIME, DAYS[role])
        now = int(self.clock())
        signed.unrecognized_fields[LIFETIME] = lifetime
        signed.expires = datetime.fromtimestamp(now + lifetime * DAY, timezone.utc)
        if role == TIMESTAMP:
            signed.unrecognized_fields[SIGNED_AT] = self._after_the_last(now)
        metadata = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata

    def write(self, role: str, metadata: Metadata[Any]) -> Path:
        """Put signed metadata among the files that are served."""
        path = self.path(role, metadata.signed.version)
        atomic.write(path, metadata.to_bytes(), like=self.folder)
        return path

    def stage(self, role: str, metadata: Metadata[Any]) -> Path:
        """Keep metadata that needs more signatures."""
        path = self.staging / f"{role}.json"
        atomic.write(path, metadata.to_bytes(), like=self.folder)
        return path

    def unstage(self, role: str) -> None:
        """Forget staged metadata."""
        if self.staging.is_dir():
            atomic.remove(self.staging / f"{role}.json")

    def left(self, signed: Signed) -> float:
        """Days until metadata expires."""
        return (signed.expires.timestamp() - self.clock()) / DAY

    def _after_the_last(self, now: int) -> int:
        before = self.timestamp()
        last = before.signed.unrecognized_fields.get(SIGNED_AT, 0) if before else 0
        if now < last - SLACK:
            said = datetime.fromtimestamp(last, timezone.utc).isoformat()
            raise UsageError(
                f"the clock of this machine is {last - now} seconds before the last timestamp, of "
                f"{said}: set the clock"
            )
        return max(now, last)

    def _newest(self, role: str, delegator: Root | Targets) -> SignedFile[Any]:
        """The newest version that is signed. A newer one may wait for keys that come into force."""
        for version in reversed(self.versions(role)):
            found = self.read(self.path(role, version))
            if enough(role, delegator, found.metadata):
                return found
        raise TrustError(
            f"{self.folder} holds no {role} metadata that enough keys of the role have signed: "
            "restore the repository's folder from a copy"
        )

    def _if_signed(self, role: str) -> SignedFile[Any] | None:
        if not self.last_version(role):
            return None
        found = self.read(self.path(role, self.last_version(role)))
        return found if enough(role, self.root().signed, found.metadata) else None

    @staticmethod
    def _require(role: str, delegator: Root | Targets, found: SignedFile[Any]) -> None:
        if not enough(role, delegator, found.metadata):
            raise TrustError(
                f"{found.path} is not signed by enough keys of the role {role}: restore the "
                "repository's folder from a copy"
            )

    @staticmethod
    def read(path: Path) -> SignedFile[Any]:
        """A metadata file. Its signatures are not verified. Raises InputError."""
        return SignedFile(path, atomic.read(path, LARGEST))


def signatures(role: str, delegator: Root | Targets, metadata: Metadata[Any]) -> tuple[int, int]:
    """How many of a role's keys have signed, and how many must."""
    try:
        found = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError):  # it names no such role
        return 0, 1
    return len(found.signed), found.threshold


def enough(role: str, delegator: Root | Targets, metadata: Metadata[Any]) -> bool:
    """Whether enough keys of a role have signed."""
    have, threshold = signatures(role, delegator, metadata)
    return have >= threshold

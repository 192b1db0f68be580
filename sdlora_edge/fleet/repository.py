"""The fleet repository: static files that any web server, bucket or CDN serves to devices.

    metadata/    who may publish what, signed (`roles`)
    targets/     packets, bundles and roll-out plans, each named by its digest

Files appear in this order: targets, what lists them, the snapshot, the timestamp. Each is replaced
in one step. So a client sees the old state or the new one at any moment, also after a crash, and
the next command completes what was begun.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, NothingToDo, ResourceError, TrustError, UsageError
from ..formats import signing
from ..formats.bundle import TRUST as TRUST_FILE
from ..formats.canonical import parse_exact_json, sha256
from ..results import Result
from ..storage import disk
from .founding import RoleKeys as RoleKeys
from .founding import Setup, found
from .intake import Keys, Offered, examine
from .online import OnlineKeys
from .roles import (
    OFFLINE,
    ROOT,
    TARGETS,
    Metadata,
    Roles,
    TargetFile,
    Targets,
    enough,
    signatures,
)
from .rollout import Plan
from .settling import expiries, settle, settled, sign_rollout, soon
from .shelf import Shelf, content, make_served
from .targets import BUNDLE, BUNDLES, ROLLOUT_ROLE, ROLLOUTS, TRUST, UPDATE, Published, Target

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

log = logging.getLogger("sdlora_edge")
LOCK = "fleet.lock"
WARN_DAYS = 30
"""days before root or targets expire from which on `refresh` warns: people must sign them"""


@dataclass(frozen=True)
class Publication(Result):
    """What a change of the published files did.

    Attributes:
        added: Target paths that are new.
        removed: Target paths that are no longer listed.
        version: Of the metadata of the role `targets`.
        signatures: Keys of the role that have signed.
        threshold: Keys that must sign.
        complete: Whether devices see the change.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    version: int
    signatures: int
    threshold: int
    complete: bool


@dataclass(frozen=True)
class Refreshed(Result):
    """What `refresh` did.

    Attributes:
        renewed: Roles whose metadata was signed anew.
        expires: Days until the metadata of each role expires.
    """

    renewed: tuple[str, ...]
    expires: Mapping[str, int]


class Repository:
    """A fleet repository in a folder.

    path: The folder.
    clock: gives Unix seconds.
    pinned: The first root, as it is known from elsewhere. With it nobody can put another
        repository in the place of this one.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.time, pinned: bytes | None = None
    ) -> None:
        self.path, self.roles, self.shelf = path, Roles(path, clock, pinned), Shelf(path)

    @classmethod
    def create(
        cls, path: Path | str, setup: Setup, clock: Callable[[], float] = time.time
    ) -> Repository:
        """Make an empty repository.

        Raises:
            UsageError: The folder exists and is not empty, or a threshold cannot be met.
        """
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty: choose another folder for the repository")
        signers = signing.signers_of(setup.signers)
        make_served(path, path / "metadata", path / "targets")
        repository = cls(path, clock)
        with repository.locked():
            found(repository.roles, setup, signers)
        return repository

    @classmethod
    def open(
        cls,
        path: Path | str,
        clock: Callable[[], float] = time.time,
        pinned: bytes | None = None,
    ) -> Repository:
        """Open a repository, and verify its metadata.

        Raises:
            InputError: There is none, or a file is damaged.
            TrustError: Its metadata is not signed by the keys of their roles.
        """
        repository = cls(Path(path), clock, pinned)
        if not repository.roles.versions(ROOT):
            raise InputError(
                f"{path} is not a fleet repository: make one with sdlora-edge fleet init"
            )
        repository.roles.root()
        repository.roles.targets()
        return repository

    def targets(self) -> list[Target]:
        """The published packets, and one target for each published bundle: its manifest."""
        return [
            Target(path, one.length, one.hashes["sha256"], Published.from_custom(one.custom))
            for path, one in self.roles.targets().signed.targets.items()
            if one.custom is not None
        ]

    def publish(
        self,
        files: Sequence[Path],
        signers: signing.Signers,
        online: OnlineKeys | None = None,
        bundles: Sequence[Path] = (),
    ) -> Publication:
        """Add packets of all kinds, folders of packets, and bundles.

        With fewer keys than needed, the change is staged; `sign` adds the others.

        Args:
            files: What to publish.
            signers: Keys of the role `targets`.
            online: Keys of the other roles. Without them, devices see the change after the next
                `refresh`.
            bundles: Bundles that verify packets and need not be published.

        Raises:
            InputError: A file is neither a packet nor a bundle, or is damaged.
            NotForThisDevice: No bundle of a packet's lineage is known.
            NothingToDo: All is published already.
            TrustError: A packet's signatures are missing, or a key is not one of the role.
        """
        published = {one.digest: one for one in self.targets()}
        offered = examine([Path(f) for f in files], bundles, self._keys(), published)
        with self.locked():
            return self._publish(offered, signers, online)

    def sign(
        self, role: str, signers: signing.Signers, online: OnlineKeys | None = None
    ) -> Publication:
        """Add signatures to the staged metadata of a role, and put it in force once complete.

        Raises:
            NothingToDo: Nothing is staged, or these keys have signed it.
            TrustError: A key is not one of the role.
        """
        with self.locked():
            waiting = self.roles.staged(role)
            if waiting is None:
                raise NothingToDo(f"no metadata of the role {role} waits for a signature")
            metadata: Metadata[Any] = waiting.metadata
            loaded = self.own(role, signing.signers_of(signers))
            fresh = [s for s in loaded if s.public_key.keyid not in metadata.signatures]
            if not fresh:
                raise NothingToDo(f"key {loaded[0].public_key.keyid[:12]} has signed it already")
            for signer in fresh:
                metadata.sign(signer, append=True)
            return self.finish(role, metadata, online)

    def refresh(self, online: OnlineKeys, days: Mapping[str, int] | None = None) -> Refreshed:
        """Sign a new timestamp, and renew the snapshot and the plans if they expire soon.

        Args:
            online: The keys.
            days: New lifetimes of these roles, in days.
        """
        chosen = days or {}
        with self.locked():
            renewed = []
            rollout = self.roles.rollout().signed
            if ROLLOUT_ROLE in chosen or soon(self.roles, ROLLOUT_ROLE, rollout):
                sign_rollout(self.roles, rollout, online, chosen)
                renewed.append(ROLLOUT_ROLE)
            renewed += settle(self.roles, online, chosen)
            left = expiries(self.roles)
        for role in OFFLINE:
            if left[role] < WARN_DAYS:
                log.warning(
                    "the metadata of the role %s expires in %d days: renew it with "
                    "sdlora-edge fleet renew %s",
                    *(role, left[role], role),
                )
        return Refreshed(tuple(renewed), left)

    def channels(self) -> list[str]:
        """The channels that have a plan."""
        names = self.roles.rollout().signed.targets
        return sorted(n.removeprefix(ROLLOUTS).removesuffix(".json") for n in names)

    def plan(self, channel: str) -> Plan:
        """The plan of a channel; without steps if it has none."""
        path = f"{ROLLOUTS}{channel}.json"
        listed = self.roles.rollout().signed.targets.get(path)
        return Plan.from_json(self.shelf.read(path, listed)) if listed else Plan(channel)

    def set_plan(self, plan: Plan, online: OnlineKeys) -> None:
        """Put a plan in force.

        Raises:
            InputError: A new step is of a packet that is not published.
        """
        with self.locked():
            before = {step.packet for step in self.plan(plan.channel).steps}
            known = {one.digest for one in self.targets() if one.published.kind == UPDATE}
            for step in plan.steps:
                if step.packet not in before | known:
                    raise InputError(
                        f"packet {step.packet[:12]} is not published: publish it with "
                        "sdlora-edge fleet publish"
                    )
            data = plan.to_json()
            path = f"{ROLLOUTS}{plan.channel}.json"
            self.shelf.put(path, sha256(data), [data])
            signed = self.roles.rollout().signed
            signed.targets[path] = TargetFile.from_data(path, data, ["sha256"])
            sign_rollout(self.roles, signed, online)
            settle(self.roles, online)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other publishers out. Raises ResourceError if one is at work."""
        try:
            with disk.lock(self.path / LOCK, wait=5):
                yield
        except BlockingIOError as error:
            raise ResourceError(
                f"another process changes {self.path}: try again when it has ended"
            ) from error

    def own(self, role: str, signers: Collection[CryptoSigner]) -> list[CryptoSigner]:
        """The keys that are of a role. Raises TrustError if none is."""
        keyids = self.roles.keyids(role)
        if found := [s for s in signers if s.public_key.keyid in keyids]:
            return found
        wanted = ", ".join(sorted(keyid[:12] for keyid in keyids))
        raise TrustError(f"none of these keys is one of the role {role}: sign with {wanted}")

    def finish(self, role: str, metadata: Metadata[Any], online: OnlineKeys | None) -> Publication:
        """Put signed offline metadata in force if enough keys have signed, or stage it."""
        delegator = self.roles.root().signed
        have, threshold = signatures(role, delegator, metadata)
        before = self.roles.targets().signed.targets
        after = metadata.signed.targets if role == TARGETS else before
        if enough(role, delegator, metadata):
            self.roles.write(role, metadata)
            self.roles.unstage(role)
            if online is not None:
                settle(self.roles, online)
        else:
            self.roles.stage(role, metadata)
        return Publication(
            tuple(path for path in after if path not in before),
            tuple(path for path in before if path not in after),
            metadata.signed.version,
            have,
            threshold,
            have >= threshold and online is not None,
        )

    def _publish(
        self, offered: Sequence[Offered], signers: signing.Signers, online: OnlineKeys | None
    ) -> Publication:
        targets = self._next_targets()
        new = [one for one in offered if one.path not in targets.targets]
        for one in offered:
            listed = targets.targets.get(one.path)
            if listed and listed.hashes["sha256"] != one.digest:
                raise InputError(f"{one.path} is published with another digest: build it again")
            self.shelf.put(one.path, one.digest, content(one.source))
        if not new:
            return self._complete(online)
        for one in new:
            custom = {"custom": one.published.to_dict()} if one.published else {}
            targets.targets[one.path] = TargetFile(
                one.size, {"sha256": one.digest}, one.path, custom
            )
        return self.change(targets, signers, online)

    def change(
        self, targets: Targets, signers: signing.Signers, online: OnlineKeys | None
    ) -> Publication:
        """Sign the next version of the published files, and put it in force or stage it."""
        own = self.own(TARGETS, signing.signers_of(signers))
        return self.finish(TARGETS, self.roles.sign(TARGETS, targets, own), online)

    def _next_targets(self) -> Targets:
        """What the next version begins with: what is staged, or what is in force."""
        newest, waiting = self.roles.targets().signed, self.roles.staged(TARGETS)
        if waiting and waiting.signed.version == newest.version + 1:
            signed: Targets = waiting.signed
            return signed
        newest.version += 1
        return newest

    def _complete(self, online: OnlineKeys | None) -> Publication:
        """Finish what a crash has left. Raises NothingToDo if it has left nothing."""
        if self.roles.staged(TARGETS):
            raise NothingToDo(
                "these files wait for more signatures: add them with sdlora-edge fleet sign"
            )
        if settled(self.roles) or online is None:
            raise NothingToDo("all of these files are published already")
        settle(self.roles, online)
        newest = self.roles.targets()
        root = self.roles.root().signed
        have, threshold = signatures(TARGETS, root, newest.metadata)
        return Publication((), (), newest.signed.version, have, threshold, True)

    def _keys(self) -> Keys:
        """Who may sign packets, by the published bundles and trust packets."""
        listed = self.roles.targets().signed.targets
        old = [one for one in self.targets() if one.published.kind == TRUST]
        old.sort(key=lambda one: one.published.sequence)
        keys = Keys([self.shelf.read(one.path, listed[one.path]) for one in old])
        for bundle in self.targets():
            if bundle.published.kind == BUNDLE:
                path = f"{BUNDLES}{bundle.digest}/{TRUST_FILE}"
                value = parse_exact_json(self.shelf.read(path, listed[path]), path)
                keys.add(bundle.published.lineage, signing.Trust.from_dict(value))
        return keys

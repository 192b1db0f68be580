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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, NothingToDo, ResourceError, UsageError
from ..formats import signing
from ..formats.bundle import TRUST as TRUST_FILE
from ..formats.canonical import parse_exact_json, sha256
from ..results import Result
from ..storage import disk
from .enforcing import Publication, finish, own
from .founding import RoleKeys as RoleKeys
from .founding import Setup, found
from .online import OnlineKeys
from .pacing import require_name, without_covered
from .pruning import Pruned, PruneOptions, forget, stranded, superfluous
from .roles import (
    OFFLINE,
    ROOT,
    TARGETS,
    Metadata,
    Roles,
    TargetFile,
    enough,
    signatures,
)
from .rollout import Plan
from .rotation import RoleChange, next_targets, rotate
from .settling import expiries, settle, settled, sign_rollout, soon
from .shelf import Shelf, content, make_served
from .targets import BUNDLE, BUNDLES, ROLLOUT_ROLE, ROLLOUTS, TRUST, UPDATE, Published, Target
from .vetting import Keys, Offered, examine

log = logging.getLogger("sdlora_edge")
LOCK = "fleet.lock"
WARN_DAYS = 30
"""days before root or targets expire from which on `refresh` warns: people must sign them"""


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
        path = Path(path)
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
        cls.require_new(path)
        signers = signing.signers_of(setup.signers)
        make_served(path, path / "metadata", path / "targets")
        repository = cls(path, clock)
        with repository.locked():
            found(repository.roles, setup, signers)
        return repository

    @staticmethod
    def require_new(path: Path) -> None:
        """Raises UsageError unless a repository may be made there."""
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UsageError(f"{path} exists and is not empty: choose another folder")

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
            given = signing.signers_of(signers)
            loaded = own(self.roles, role, given)
            fresh = [s for s in loaded if s.public_key.keyid not in metadata.signatures]
            if not fresh and not enough(role, self.roles.root().signed, metadata):
                raise NothingToDo(f"key {loaded[0].public_key.keyid[:12]} has signed it already")
            for signer in fresh:
                metadata.sign(signer, append=True)
            return finish(self.roles, role, metadata, given, online)

    def rotate(
        self,
        role: str,
        change: RoleChange,
        signers: signing.Signers,
        online: OnlineKeys | None = None,
    ) -> Publication:
        """Change the keys of a role, or renew root or targets, whose metadata then expires later.

        Args:
            role: One of `roles.ROLES`.
            change: Keys to add and to remove, the threshold, the lifetime.
            signers: Keys of root (of targets, for the role rollout), old and new.
            online: Keys of the online roles, old and new.

        Raises:
            UsageError: The threshold cannot be met, or a key to remove is not of the role.
            TrustError: None of the keys may sign.
        """
        with self.locked():
            return rotate(self.roles, role, change, signing.signers_of(signers), online)

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
        self.pace(plan.channel, lambda _: plan, online)

    def pace(self, channel: str, change: Callable[[Plan], Plan], online: OnlineKeys) -> Plan:
        """Change the plan of a channel, with nobody else changing it meanwhile.

        Args:
            channel: Its name.
            change: Makes the new plan of the one in force; `pacing` has such functions.
            online: The keys.

        Raises:
            InputError: A new step is of a packet that is not published.
        """
        require_name(channel)
        with self.locked():
            before = self.plan(channel)
            plan = change(before)
            known = {one.digest for one in self.targets() if one.published.kind == UPDATE}
            known |= {step.packet for step in before.steps}
            for step in plan.steps:
                if step.packet not in known:
                    raise InputError(
                        f"packet {step.packet[:12]} is not published: publish it with "
                        "sdlora-edge fleet publish"
                    )
            self._put_plan(plan, online)
            settle(self.roles, online)
            return plan

    def prune(
        self,
        signers: signing.Signers = (),
        online: OnlineKeys | None = None,
        options: PruneOptions = PruneOptions(),
    ) -> Pruned:
        """Remove packets that a squash covers, steps that are done, and files that nobody needs.

        Args:
            signers: Keys of targets. Without them, packets stay.
            online: Keys of the online roles. Without them, packets and steps stay.
            options: What to keep.

        Raises:
            NothingToDo: There is nothing to remove.
        """
        with self.locked():
            plans = [self.plan(channel) for channel in self.channels()] if online else []
            slim = [without_covered(plan) for plan in plans]
            targets = self.targets()
            gone = superfluous(targets, slim, options.states) if signers and online else []
            if not options.dry_run and online:
                for old, plan in zip(plans, slim):
                    if plan != old:
                        self._put_plan(plan, online)
                waits = bool(gone) and self._withdraw(gone, signers, online).staged
                settle(self.roles, online)
            else:
                waits = False
            files, size = forget(self.roles, self.shelf, options.days, options.dry_run)
        steps = sum(len(plan.steps) for plan in plans) - sum(len(plan.steps) for plan in slim)
        if not (gone or steps or files):
            raise NothingToDo("there is nothing to remove")
        paths = tuple(one.path for one in gone)
        return Pruned(paths, steps, tuple(stranded(targets, gone)), files, size, waits)

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

    def _publish(
        self, offered: Sequence[Offered], signers: signing.Signers, online: OnlineKeys | None
    ) -> Publication:
        targets = next_targets(self.roles)
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
        loaded = signing.signers_of(signers)
        metadata = self.roles.sign(TARGETS, targets, own(self.roles, TARGETS, loaded))
        return finish(self.roles, TARGETS, metadata, loaded, online)

    def _withdraw(
        self, gone: Sequence[Target], signers: signing.Signers, online: OnlineKeys
    ) -> Publication:
        targets = next_targets(self.roles)
        for one in gone:
            targets.targets.pop(one.path, None)
        loaded = signing.signers_of(signers)
        metadata = self.roles.sign(TARGETS, targets, own(self.roles, TARGETS, loaded))
        return finish(self.roles, TARGETS, metadata, loaded, online)

    def _put_plan(self, plan: Plan, online: OnlineKeys) -> None:
        data, path = plan.to_json(), f"{ROLLOUTS}{plan.channel}.json"
        self.shelf.put(path, sha256(data), [data])
        signed = self.roles.rollout().signed
        signed.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        sign_rollout(self.roles, signed, online)

    def _complete(self, online: OnlineKeys | None) -> Publication:
        """Finish what a crash has left. Raises NothingToDo if it has left nothing."""
        root, waiting = self.roles.root().signed, self.roles.staged(TARGETS)
        if waiting and enough(TARGETS, root, waiting.metadata):
            return finish(self.roles, TARGETS, waiting.metadata, [], online)
        if waiting:
            raise NothingToDo(
                "these files wait for more signatures: add them with sdlora-edge fleet sign"
            )
        if settled(self.roles) or online is None:
            raise NothingToDo("all of these files are published already")
        settle(self.roles, online)
        newest = self.roles.targets()
        have, threshold = signatures(TARGETS, root, newest.metadata)
        return Publication(TARGETS, newest.signed.version, have, threshold, False, True)

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

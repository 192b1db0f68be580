"""What a fleet repository holds, for people and programs; and the packet that a person names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..formats.canonical import sha256
from ..results import Result
from ..storage import atomic
from .keyholders import Choices, KeyFolder, chosen_keys, public_keys
from .repository import Repository
from .roles import OFFLINE, ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, SignedFile
from .rollout import Plan, Step
from .rotation import KeyNames, RoleChange
from .settling import settled
from .targets import BUNDLE, ROLLOUT_ROLE, UPDATE, Target


@dataclass(frozen=True)
class RoleStatus(Result):
    """One role.

    Attributes:
        version: Of its metadata.
        expires: ISO 8601, UTC.
        days: Until then; negative if it has expired.
        threshold: Keys that must sign.
        keys: Their ids.
        staged: Whether newer metadata waits for more signatures.
    """

    version: int
    expires: str
    days: int
    threshold: int
    keys: tuple[str, ...]
    staged: bool


@dataclass(frozen=True)
class TargetStatus(Result):
    """One packet or bundle. The fields are those of `targets.Published` and `targets.Target`."""

    kind: str
    lineage: str
    sequence: int
    revision: int
    name: str
    begin: str
    end: str
    path: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class RepositoryStatus(Result):
    """A repository.

    Attributes:
        path: Its folder.
        settled: Whether devices see all of it; if not, `refresh` makes it so.
        roles: By name.
        targets: Packets and bundles by lineage, then by task.
        channels: The plan of each channel.
    """

    path: Path
    settled: bool
    roles: Mapping[str, RoleStatus]
    targets: tuple[TargetStatus, ...]
    channels: Mapping[str, Plan]


@dataclass(frozen=True)
class Created(Result):
    """A new repository. root: SHA-256 of the first root, which devices trust."""

    repository: Path
    keys: Path
    root: str


def created(
    path: Path, folder: KeyFolder, choices: Choices, passphrase: bytes | None = None
) -> Created:
    """Make a repository and its keys.

    Raises:
        UsageError: The folder is not empty, a key exists, or a threshold cannot be met.
    """
    Repository.require_new(path)
    repository = Repository.create(path, folder.prepare(choices, passphrase))
    root = repository.roles.root().data
    folder.pin(root)
    return Created(path, folder.path, sha256(root))


def rotated(
    repository: Repository,
    folder: KeyFolder,
    role: str,
    names: KeyNames,
    passphrase: bytes | None = None,
) -> RoleChange:
    """The change that a person asks for. If it names nothing, new keys replace all of the role.

    Raises:
        InputError: A name fits no key.
        UsageError: The role has no such key.
    """
    keyids = repository.roles.delegator(role).get_delegated_role(role).keyids
    if names == KeyNames():
        made = folder.make(role, len(keyids), passphrase)
        return RoleChange(
            public_keys([str(file.with_suffix(".pub")) for file in made]), tuple(keyids)
        )
    add, remove = public_keys(names.add), chosen_keys(keyids, names.remove)
    return RoleChange(add, tuple(remove), names.threshold)


def status(repository: Repository) -> RepositoryStatus:
    """Describe a repository."""
    roles = repository.roles
    files: dict[str, SignedFile[Any] | None] = {
        ROOT: roles.root(),
        TARGETS: roles.targets(),
        ROLLOUT_ROLE: roles.rollout(),
        SNAPSHOT: roles.snapshot(),
        TIMESTAMP: roles.timestamp(),
    }
    found = {}
    for role in ROLES:
        if (file := files[role]) is None:
            continue
        keys = roles.delegator(role).get_delegated_role(role)
        found[role] = RoleStatus(
            version=file.signed.version,
            expires=file.signed.expires.isoformat(),
            days=int(roles.left(file.signed) // 1),
            threshold=keys.threshold,
            keys=tuple(keys.keyids),
            staged=role in OFFLINE and roles.staged(role) is not None,
        )
    return RepositoryStatus(
        path=repository.path,
        settled=settled(roles),
        roles=found,
        targets=tuple(
            _target(one, _size(repository, one)) for one in sorted(repository.targets(), key=_order)
        ),
        channels={channel: repository.plan(channel) for channel in repository.channels()},
    )


def find_update(targets: Sequence[Target], name: str) -> Target:
    """The published update that a person names: by its file, a task number or a digest.

    Of several updates that lead to one state, the smallest.

    Args:
        targets: What is published.
        name: A file, the number of a task, or the first digits of a SHA-256.

    Raises:
        InputError: None is published that fits, or several that lead to different states.
    """
    updates = [one for one in targets if one.published.kind == UPDATE]
    if name.isdigit() and len(name) < 8:
        fitting = [one for one in updates if one.published.sequence == int(name)]
        newest = max((one.published.revision for one in fitting), default=0)
        fitting = [one for one in fitting if one.published.revision == newest]
    else:
        fitting = [one for one in updates if one.digest.startswith(_digest(name))]
    if len({(one.published.lineage, one.published.end) for one in fitting}) == 1:
        return min(fitting, key=lambda one: (one.size, one.path))
    raise InputError(
        f"{name!r} names {'several published packets' if fitting else 'no published packet'}: give "
        "its file, or the digest that sdlora-edge fleet status shows"
    )


def find_step(plan: Plan, name: str) -> Step:
    """The step of a plan that a person names, as in `find_update`. Raises UsageError."""
    if name.isdigit() and len(name) < 8:
        fitting = [step for step in plan.steps if step.sequence == int(name)][-1:]
    else:
        fitting = [step for step in plan.steps if step.packet.startswith(_digest(name))]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        f"channel {plan.channel} has no step {name!r}: sdlora-edge fleet rollout status lists "
        "those it has"
    )


def _digest(name: str) -> str:
    return atomic.sha256_of(Path(name))[0] if Path(name).is_file() else name.lower() or "-"


def _order(one: Target) -> tuple[str, bool, int, int, str]:
    published = one.published
    first = published.kind != BUNDLE
    return published.lineage, first, published.sequence, published.revision, one.path


def _size(repository: Repository, target: Target) -> int:
    """Bytes of a packet, or of all files of a bundle."""
    if target.published.kind != BUNDLE:
        return target.size
    folder = target.path[: target.path.rindex("/") + 1]
    listed = repository.roles.targets().signed.targets
    return sum(file.length for path, file in listed.items() if path.startswith(folder))


def _target(one: Target, size: int) -> TargetStatus:
    published = one.published
    return TargetStatus(
        kind=published.kind,
        lineage=published.lineage,
        sequence=published.sequence,
        revision=published.revision,
        name=published.name,
        begin=published.begin,
        end=published.end,
        path=one.path,
        digest=one.digest,
        bytes=size,
    )

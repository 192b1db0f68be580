"""New keys for a role, another threshold, another lifetime."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from .enforcing import Publication, finish, own
from .online import OnlineKeys
from .roles import OFFLINE, ROOT, TARGETS, Roles, Root, Targets
from .targets import ROLLOUT_ROLE

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key


@dataclass(frozen=True)
class RoleChange:
    """What changes for a role. Nothing but the expiry, if all is left at its default.

    Attributes:
        add: Public keys that sign from now on.
        remove: Ids of keys that sign no longer.
        threshold: Keys that must sign. None: as many as before.
        days: Days until its metadata expires; of root and targets alone. None: as before.
    """

    add: Sequence[Key] = ()
    remove: Collection[str] = ()
    threshold: int | None = None
    days: int | None = None


@dataclass(frozen=True)
class KeyNames:
    """The change of a role's keys as a person names it: files of public keys, or digits of ids."""

    add: Sequence[str] = ()
    remove: Sequence[str] = ()
    threshold: int | None = None


def next_targets(roles: Roles) -> Targets:
    """What the next version of the published files begins with: what is staged, or in force."""
    waiting = roles.staged(TARGETS)
    newest: Targets = waiting.signed if waiting else roles.targets().signed
    newest.version = roles.last_version(TARGETS) + 1
    return newest


def rotate(
    roles: Roles,
    role: str,
    change: RoleChange,
    signers: Sequence[CryptoSigner],
    online: OnlineKeys | None,
) -> Publication:
    """Change the keys of a role, or renew root or targets.

    Root names the keys of all roles but `rollout`, which targets names.

    Raises:
        UsageError: The threshold cannot be met, a key to remove is not of the role, or other
            metadata waits for signatures.
        TrustError: None of the keys may sign.
    """
    for waiting in OFFLINE:
        if roles.staged(waiting):
            raise UsageError(
                f"metadata of the role {waiting} waits for signatures in {roles.staging}: sign it "
                f"with sdlora-edge fleet sign {waiting}, or remove the file"
            )
    if role == ROLLOUT_ROLE or (role == TARGETS and not _changes(change)):
        targets = next_targets(roles)
        if role == ROLLOUT_ROLE:
            _alter(targets, role, change)
        days = change.days if role == TARGETS else None
        metadata = roles.sign(TARGETS, targets, own(roles, TARGETS, signers), days)
        return finish(roles, TARGETS, metadata, signers, online)
    root = copy.deepcopy(roles.root().signed)
    root.version += 1
    _alter(root, role, change)
    may = {k for one in (roles.root().signed, root) for k in one.roles[ROOT].keyids}
    found = [s for s in signers if s.public_key.keyid in may]
    days = change.days if role == ROOT else None
    metadata_of_root = roles.sign(ROOT, root, found or own(roles, ROOT, signers), days)
    return finish(roles, ROOT, metadata_of_root, signers, online)


def _changes(change: RoleChange) -> bool:
    return bool(change.add or change.remove or change.threshold)


def _alter(delegator: Root | Targets, role: str, change: RoleChange) -> None:
    entry = delegator.get_delegated_role(role)
    if unknown := sorted(set(change.remove) - set(entry.keyids)):
        raise UsageError(
            f"--remove: key {unknown[0][:12]} is not one of the role {role}: sdlora-edge fleet "
            "status --json lists them"
        )
    for keyid in change.remove:
        delegator.revoke_key(keyid, role)
    for key in change.add:
        delegator.add_key(key, role)
    threshold = entry.threshold if change.threshold is None else change.threshold
    if not 1 <= threshold <= len(entry.keyids):
        raise UsageError(
            f"a threshold of {threshold} with {len(entry.keyids)} key(s) of the role {role}: "
            "choose between 1 and all of them"
        )
    entry.threshold = threshold

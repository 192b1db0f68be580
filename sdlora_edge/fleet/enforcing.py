"""How signed metadata of root and targets comes into force once enough keys have signed it.

New keys sign before the metadata that names them is written, beside the old ones. So there is no
moment, and no crash, after which devices meet metadata that the keys they know have not signed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TrustError, UsageError
from ..results import Result
from .online import OnlineKeys
from .roles import (
    ONLINE,
    ROOT,
    TARGETS,
    Metadata,
    Roles,
    Root,
    Targets,
    enough,
    signatures,
)
from .settling import settle, sign_rollout
from .targets import ROLLOUT_ROLE

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner


@dataclass(frozen=True)
class Publication(Result):
    """What a change of root or targets did.

    Attributes:
        role: The role.
        version: Of its metadata.
        signatures: Keys of the role that have signed.
        threshold: Keys that must sign.
        staged: Whether it waits for more signatures.
        visible: Whether devices see it. If not, and it is not staged, `refresh` makes it so.
        added: Target paths that are new.
        removed: Target paths that are no longer listed.
    """

    role: str
    version: int
    signatures: int
    threshold: int
    staged: bool
    visible: bool
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def own(roles: Roles, role: str, signers: Collection[CryptoSigner]) -> list[CryptoSigner]:
    """The keys that are of a role, now or once what is staged is in force.

    Raises:
        TrustError: None is.
    """
    keyids = roles.keyids(role)
    if found := [s for s in signers if s.public_key.keyid in keyids]:
        return found
    wanted = ", ".join(sorted(keyid[:12] for keyid in keyids))
    raise TrustError(f"none of these keys is one of the role {role}: sign with {wanted}")


def finish(
    roles: Roles,
    role: str,
    metadata: Metadata[Any],
    signers: Sequence[CryptoSigner],
    online: OnlineKeys | None,
) -> Publication:
    """Put metadata of root or targets in force if enough keys have signed, or stage it.

    Args:
        roles: The repository's metadata.
        role: ROOT or TARGETS.
        metadata: What was signed.
        signers: Keys that sign what the change entails.
        online: Keys of the other roles. Without them devices see the change after `refresh`.
    """
    before, after = roles.targets().signed.targets, roles.targets().signed.targets
    if role == TARGETS:
        after = metadata.signed.targets
    have, threshold = _missing(roles.root().signed, role, metadata)
    roles.stage(role, metadata)
    if complete := have >= threshold:
        if role == ROOT:
            _enforce_root(roles, metadata, signers, online)
        else:
            _enforce_targets(roles, metadata, online)
    return Publication(
        role,
        metadata.signed.version,
        have,
        threshold,
        staged=not complete,
        visible=complete and online is not None,
        added=tuple(path for path in after if path not in before),
        removed=tuple(path for path in before if path not in after),
    )


def _missing(root: Root, role: str, metadata: Metadata[Any]) -> tuple[int, int]:
    """(have, need) of the signatures. A new root needs those of the old keys and of the new."""
    sides = [root, metadata.signed] if role == ROOT else [root]
    counts = [signatures(role, side, metadata) for side in sides]
    return max(counts, key=lambda count: count[1] - count[0])


def _enforce_root(
    roles: Roles,
    metadata: Metadata[Root],
    signers: Sequence[CryptoSigner],
    online: OnlineKeys | None,
) -> None:
    """Put a complete root in force. It is staged, so its keys sign already."""
    root, targets = metadata.signed, roles.targets()
    if not enough(TARGETS, root, targets.metadata):
        targets.signed.version = roles.last_version(TARGETS) + 1
        signed = roles.sign(TARGETS, targets.signed, own(roles, TARGETS, signers))
        if not enough(TARGETS, root, signed):
            have, threshold = signatures(TARGETS, root, signed)
            raise UsageError(
                f"the new root waits in {roles.staging}: the published files must be signed by "
                f"{threshold} of the new keys of targets, and {have} are here: run "
                "sdlora-edge fleet sign root with the others too"
            )
        roles.write(TARGETS, signed)
    if online is None:
        _require_online(roles, root)
    elif _has_all(roles, online):
        settle(roles, online)
    roles.write(ROOT, metadata)
    roles.unstage(ROOT)
    if online is not None:
        settle(roles, online)


def _enforce_targets(roles: Roles, metadata: Metadata[Targets], online: OnlineKeys | None) -> None:
    rollout = roles.rollout()
    if not enough(ROLLOUT_ROLE, metadata.signed, rollout.metadata):
        if online is None:
            raise UsageError("the keys of rollout change: pass the online keys, with the new one")
        sign_rollout(roles, rollout.signed, online)
        newest = roles.newest_unverified(ROLLOUT_ROLE)
        if not enough(ROLLOUT_ROLE, metadata.signed, newest.metadata):
            raise TrustError(
                f"{online.folder} holds too few of the new keys of rollout: put them there"
            )
    roles.write(TARGETS, metadata)
    roles.unstage(TARGETS)
    if online is not None:
        settle(roles, online)


def _require_online(roles: Roles, root: Root) -> None:
    """Raises UsageError if the online roles must be signed by new keys."""
    for role, found in (("snapshot", roles.snapshot()), ("timestamp", roles.timestamp())):
        if found is None or not enough(role, root, found.metadata):
            raise UsageError(f"the keys of {role} change: pass the online keys, with the new one")


def _has_all(roles: Roles, online: OnlineKeys) -> bool:
    """Whether the keys in force are here. A stolen one may have been removed."""
    return all(
        len(set(roles.delegator(role).get_delegated_role(role).keyids) & set(online.signers))
        >= roles.delegator(role).get_delegated_role(role).threshold
        for role in ONLINE
    )

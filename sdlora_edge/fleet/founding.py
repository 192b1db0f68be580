"""How a fleet repository begins: the keys of each role, and its first metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .online import OnlineKeys
from .roles import (
    DAYS,
    OFFLINE,
    ROLES,
    ROOT,
    TARGETS,
    DelegatedRole,
    Delegations,
    Metadata,
    Roles,
    Root,
    Targets,
    enough,
    signatures,
)
from .settling import settle, sign_rollout
from .targets import ROLLOUT_ROLE, ROLLOUTS

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

    from ..formats.signing import Signers


@dataclass(frozen=True)
class RoleKeys:
    """The public keys of a role, and how many of them must sign."""

    keys: Sequence[Key]
    threshold: int = 1


@dataclass(frozen=True)
class Setup:
    """What a new repository begins with.

    Attributes:
        keys: The keys of each role of `roles.ROLES`.
        signers: Private keys of root and targets, at least as many as their thresholds.
        online: Private keys of the other roles.
        days: Days until the metadata of a role expires, for roles that differ from `roles.DAYS`.
    """

    keys: Mapping[str, RoleKeys]
    signers: Signers
    online: OnlineKeys
    days: Mapping[str, int] = field(default_factory=dict)


def found(roles: Roles, setup: Setup, signers: Sequence[CryptoSigner]) -> None:
    """Write the first metadata of each role.

    Raises:
        UsageError: A threshold cannot be met.
    """
    days = {**DAYS, **setup.days}
    root, targets = Root(consistent_snapshot=True), _targets(setup.keys[ROLLOUT_ROLE])
    for role in (r for r in ROLES if r != ROLLOUT_ROLE):
        for key in setup.keys[role].keys:
            root.add_key(key, role)
        root.roles[role].threshold = setup.keys[role].threshold
    signed: dict[str, Any] = {ROOT: root, TARGETS: targets}
    made: dict[str, Metadata[Any]] = {}
    for role in OFFLINE:
        own = [s for s in signers if s.public_key.keyid in root.roles[role].keyids]
        made[role] = roles.sign(role, signed[role], own, days[role])
        if not enough(role, root, made[role]):
            have, threshold = signatures(role, root, made[role])
            raise UsageError(
                f"the role {role} has {have} of the {threshold} keys that must sign: choose a "
                "lower threshold, or more keys"
            )
    for role in OFFLINE:
        roles.write(role, made[role])
    sign_rollout(roles, Targets(), setup.online, days)
    settle(roles, setup.online, days)


def _targets(rollout: RoleKeys) -> Targets:
    """No files yet, and the role that paces."""
    role = DelegatedRole(ROLLOUT_ROLE, [], rollout.threshold, True, [f"{ROLLOUTS}*"])
    targets = Targets(delegations=Delegations({}, {ROLLOUT_ROLE: role}))
    for key in rollout.keys:
        targets.add_key(key, ROLLOUT_ROLE)
    return targets

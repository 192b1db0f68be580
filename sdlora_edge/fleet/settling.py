"""What the online keys sign: the plans, a snapshot of what lies in the repository, a timestamp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .online import OnlineKeys
from .roles import (
    DAYS,
    LIFETIME,
    ROOT,
    ROOT_VERSION,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    MetaFile,
    Roles,
    Signed,
    SignedFile,
    Snapshot,
    T,
    Targets,
    Timestamp,
    enough,
)
from .targets import ROLLOUT_ROLE


def settle(roles: Roles, online: OnlineKeys, days: Mapping[str, int] | None = None) -> list[str]:
    """Sign a snapshot of what lies in the repository if it is new, and a timestamp.

    Args:
        roles: The metadata.
        online: The keys.
        days: New lifetimes.

    Returns:
        The roles that were signed.
    """
    chosen, old = days or {}, roles.snapshot()
    meta, root = _listed(roles), roles.root().signed.version
    waiting = roles.staged(ROOT)  # its keys must have signed before it comes into force
    renewed = [TIMESTAMP]
    if (
        old is None
        or not _lists(old.signed, meta, root)
        or (waiting is not None and not enough(SNAPSHOT, waiting.signed, old.metadata))
        or SNAPSHOT in chosen
        or soon(roles, SNAPSHOT, old.signed)
    ):
        snapshot = Snapshot(roles.last_version(SNAPSHOT) + 1, meta=meta)
        snapshot.unrecognized_fields[ROOT_VERSION] = root
        sign_online(roles, SNAPSHOT, _lasting(snapshot, old), online, chosen)
        renewed = [SNAPSHOT, TIMESTAMP]
    newest, before = roles.snapshot(), roles.timestamp()
    assert newest
    timestamp = Timestamp(roles.last_version(TIMESTAMP) + 1, snapshot_meta=newest.entry)
    sign_online(roles, TIMESTAMP, _lasting(timestamp, before), online, chosen)
    return renewed


def settled(roles: Roles) -> bool:
    """Whether devices see all that lies in the repository."""
    snapshot, timestamp = roles.snapshot(), roles.timestamp()
    if snapshot is None or timestamp is None:
        return False
    named: bool = timestamp.signed.snapshot_meta == snapshot.entry
    return named and _lists(snapshot.signed, _listed(roles), roles.root().signed.version)


def sign_rollout(
    roles: Roles, signed: Targets, online: OnlineKeys, days: Mapping[str, int] | None = None
) -> None:
    """Sign the next version of the plans."""
    signed.version = roles.last_version(ROLLOUT_ROLE) + 1
    sign_online(roles, ROLLOUT_ROLE, signed, online, days or {})


def sign_online(
    roles: Roles, role: str, signed: T, online: OnlineKeys, days: Mapping[str, int]
) -> None:
    """Sign and write the metadata of an online role."""
    signers = online.of(role, roles.keyids(role))
    roles.write(role, roles.sign(role, signed, signers, days.get(role)))


def soon(roles: Roles, role: str, signed: Signed) -> bool:
    """Whether less than half of its lifetime is left."""
    lifetime: int = signed.unrecognized_fields.get(LIFETIME, DAYS[role])
    return roles.left(signed) < lifetime / 2


def expiries(roles: Roles) -> dict[str, int]:
    """Days until the metadata of each role expires; negative if it has."""
    found: dict[str, SignedFile[Any] | None] = {
        ROOT: roles.root(),
        TARGETS: roles.targets(),
        ROLLOUT_ROLE: roles.rollout(),
        SNAPSHOT: roles.snapshot(),
        TIMESTAMP: roles.timestamp(),
    }
    return {role: int(roles.left(one.signed) // 1) for role, one in found.items() if one}


def _listed(roles: Roles) -> dict[str, MetaFile]:
    files = {TARGETS: roles.targets(), ROLLOUT_ROLE: roles.rollout()}
    return {f"{role}.json": one.entry for role, one in files.items()}


def _lists(snapshot: Snapshot, meta: Mapping[str, MetaFile], root: int) -> bool:
    same: bool = snapshot.meta == meta
    return same and snapshot.unrecognized_fields.get(ROOT_VERSION) == root


def _lasting(signed: T, before: SignedFile[T] | None) -> T:
    """Give new metadata the lifetime of the one before it."""
    if before is not None and LIFETIME in before.signed.unrecognized_fields:
        signed.unrecognized_fields[LIFETIME] = before.signed.unrecognized_fields[LIFETIME]
    return signed

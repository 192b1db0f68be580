"""What a packet brings whose signatures, content and lineage were checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..formats.control import Revocation, Rotation
from ..formats.packet import Packet
from ..results import Result


@dataclass(frozen=True)
class UpdateContents(Result):
    """An update.

    Attributes:
        task: Number of its last task; `name` is that task's name.
        classes: New classes.
        retired: Head rows whose classes are never answered again.
        renamed: (head row, new name).
    """

    verified: bool = field(default=True, init=False)
    kind: str = field(default="update", init=False)
    task: int
    name: str
    classes: tuple[str, ...]
    retired: tuple[int, ...]
    renamed: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class TrustContents(Result):
    """A change of keys. keys: as in trust.json, by their ids."""

    verified: bool = field(default=True, init=False)
    kind: str = field(default="trust", init=False)
    version: int
    threshold: int
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class RevocationContents(Result):
    """A revocation of a task, up to a revision."""

    verified: bool = field(default=True, init=False)
    kind: str = field(default="revocation", init=False)
    task: int
    revision: int


Contents = UpdateContents | TrustContents | RevocationContents


def contents(packet: Packet | Rotation | Revocation) -> Contents:
    """Tell what a packet brings. The caller has verified it."""
    if isinstance(packet, Rotation):
        return TrustContents(**packet.trust.to_dict())
    if isinstance(packet, Revocation):
        return RevocationContents(packet.revoked.sequence, packet.revoked.revision)
    updates = packet.updates
    return UpdateContents(
        packet.sequence,
        packet.update.name,
        classes=tuple(one for update in updates for one in update.classes),
        retired=tuple(row for update in updates for row in update.retired),
        renamed=tuple(pair for update in updates for pair in update.renamed),
    )

"""What a repository may forget: packets that a squash covers, steps that are done, old files."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NotForThisDevice
from ..results import Result
from ..storage import atomic, disk
from .roles import DAY, SNAPSHOT, TARGETS, Roles
from .rollout import ABORTED, Edge, Plan, cheapest
from .shelf import Shelf
from .targets import BUNDLE, ROLLOUT_ROLE, UPDATE, Target


@dataclass(frozen=True)
class PruneOptions:
    """What `prune` keeps.

    Attributes:
        days: Files stay this long after nothing lists them any more.
        states: State digests of devices that must still be able to follow, beside those of bundles
            and of roll-out steps.
        dry_run: Change nothing; only say what would be removed.
    """

    days: float = 30
    states: Sequence[str] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Pruned(Result):
    """What `prune` removed, or would remove.

    Attributes:
        packets: Target paths of packets that a squash covers.
        steps: Number of roll-out steps that a later one covers.
        stranded: Tasks in the middle of a squash from which no published packet leads on any more.
            A device that still is there must be flashed with a newer bundle.
        files: Number of files that no recent metadata lists.
        bytes: Their size.
        waits: Whether the new list of packets waits for more signatures.
    """

    packets: tuple[str, ...]
    steps: int
    stranded: tuple[int, ...]
    files: int
    bytes: int
    waits: bool


def superfluous(
    targets: Sequence[Target], plans: Iterable[Plan], states: Collection[str]
) -> list[Target]:
    """The packets that a published squash covers and that no bundle, step or device needs.

    After they are gone, the newest states and those that steps lead to can be reached as before:
    from each bundle, from where each step leads to, and from each of `states`.

    Args:
        targets: What is published.
        plans: The plans of all channels.
        states: State digests of devices that must still be able to follow.
    """
    updates = [one for one in targets if one.published.kind == UPDATE]
    live = [s for plan in plans for s in plan.steps if s.status != ABORTED]
    steps, named = {step.to for step in live}, {step.packet for step in live}
    bundles = {one.published.end for one in targets if one.published.kind == BUNDLE}
    begins = bundles | steps | {*states}
    heads = {e.published.end for e in updates} - {e.published.begin for e in updates}
    needed = {b: _reached(updates, b) & (heads | steps | {*states}) for b in begins}
    before, after = _edges(updates, backwards=True), _edges(updates)
    kept, removed = list(updates), []
    for one in (update for update in updates if update.digest not in named):
        rest = [other for other in kept if other is not one]
        if _covered(one, rest, before, after) and _lead(rest, needed):
            kept = rest
            removed.append(one)
    _prove(kept, needed)
    return removed


def stranded(targets: Sequence[Target], removed: Sequence[Target]) -> list[int]:
    """The tasks whose states no packet leaves any more, though one did.

    Of a state, its task is known from the packet that leads there.
    """
    updates = [one for one in targets if one.published.kind == UPDATE]
    left = {one.published.begin for one in updates if one not in removed}
    lost = {one.published.begin for one in removed} - left
    return sorted({one.published.sequence for one in targets if one.published.end in lost})


def forget(roles: Roles, shelf: Shelf, days: float, dry: bool) -> tuple[int, int]:
    """Remove metadata that was replaced more than `days` ago, and files that the rest lacks.

    A root is never removed: a device that was away for years follows them one by one.

    Returns:
        (number, bytes) of the files.
    """
    before = roles.clock() - days * DAY
    old = list(_replaced(roles, before))
    listed = set(_listed(roles, shelf, old))
    unlisted = [
        path
        for path in sorted(shelf.folder.rglob("*"))
        if path.is_file() and path not in listed and path.stat().st_mtime < before
    ]
    found = [*old, *unlisted]
    size = sum(path.stat().st_size for path in found)
    if not dry:
        for path in found:
            try:
                disk.unlink(path)
            except OSError as error:
                raise atomic.unwritten(path, error) from error
    return len(found), size


def _covered(
    one: Target,
    others: Sequence[Target],
    before: Mapping[str, set[str]],
    after: Mapping[str, set[str]],
) -> bool:
    """Whether one of `others` passes over a packet: it begins no later and ends no earlier.

    Args:
        one: The packet.
        others: Those that stay.
        before: The states before each state, by all that is published.
        after: The states after each.
    """
    begins = _walk(before, one.published.begin) | {one.published.begin}
    ends = _walk(after, one.published.end) | {one.published.end}
    return any(o.published.begin in begins and o.published.end in ends for o in others)


def _lead(updates: Sequence[Target], needed: Mapping[str, set[str]]) -> bool:
    edges = _edges(updates)
    return all(ends <= _walk(edges, begin) for begin, ends in needed.items())


def _reached(updates: Sequence[Target], begin: str) -> set[str]:
    return _walk(_edges(updates), begin)


def _edges(updates: Sequence[Target], backwards: bool = False) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in updates:
        begin, end = one.published.begin, one.published.end
        begin, end = (end, begin) if backwards else (begin, end)
        found.setdefault(begin, set()).add(end)
    return found


def _walk(edges: Mapping[str, set[str]], begin: str) -> set[str]:
    """Every state that can be reached, `begin` itself left out unless something leads back."""
    found: set[str] = set()
    waiting = [begin]
    while waiting:
        for end in edges.get(waiting.pop(), set()) - found:
            found.add(end)
            waiting.append(end)
    return found


def _prove(kept: Sequence[Target], needed: Mapping[str, set[str]]) -> None:
    """Walk each way as a device would. Raises NotForThisDevice if one is gone."""
    edges: list[Edge] = [one.edge for one in kept]
    for begin, ends in needed.items():
        for end in ends:
            if not cheapest(edges, begin, end):
                raise NotForThisDevice(f"no packets would lead from {begin[:12]} to {end[:12]}")


def _replaced(roles: Roles, before: float) -> Iterator[Path]:
    """Versions before the one in force whose next version is older than `before`."""
    snapshot = roles.snapshot()
    force = {
        TARGETS: roles.targets().signed.version,
        ROLLOUT_ROLE: roles.rollout().signed.version,
        SNAPSHOT: snapshot.signed.version if snapshot else 0,
    }
    for role, newest in force.items():
        versions = [version for version in roles.versions(role) if version <= newest]
        for version, following in itertools.pairwise(versions):
            if roles.path(role, following).stat().st_mtime < before:
                yield roles.path(role, version)


def _listed(roles: Roles, shelf: Shelf, gone: Collection[Path]) -> Iterator[Path]:
    """The target files that the metadata that stays lists, staged ones too."""
    for role in (TARGETS, ROLLOUT_ROLE):
        paths = [roles.path(role, v) for v in roles.versions(role)]
        files: list[Any] = [roles.read(path) for path in paths if path not in gone]
        for one in (*files, roles.staged(role)):
            for target, entry in (one.signed.targets if one else {}).items():
                yield shelf.place(target, entry.hashes["sha256"])

"""Follows a fleet repository: `sdlora-edge device sync`.

    1. Fetch the timestamp. If it names the snapshot that was handled completely, that is all: one
       request. A file in the store says what was handled (`handled.json`); it is written last, so
       after a power cut anywhere the work is done again.
    2. Refresh all metadata (`trusted`).
    3. Take new keys and revocations: all devices do, whatever the waves say.
    4. Find the last step of the channel's roll-out that this device may take, and the packets with
       the fewest bytes that lead there. Download them all, then apply them as one.

The clock of a device may be wrong. Expiries are compared with the latest of its clock and of all
times that the repository has signed. If the clock is before those, `clock_behind` says so.

What a device may do is said by signed files alone. An error never stops it from serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from .. import __version__
from ..device.device import IN_PLACE, Device
from ..device.records import Generation
from ..device.store import Store
from ..device.watch.memory import Memory
from ..errors import (
    UNWRITTEN,
    InputError,
    NotForThisDevice,
    SdloraError,
    TrustError,
    UsageError,
)
from ..formats.canonical import dump_json, sha256
from ..formats.control import read_any
from ..results import Result
from ..storage import atomic
from . import surviving
from .fetching import Fetcher, Link
from .handled import HANDLED, MOST_FAILED, Facts, Handled
from .identity import Identity, identity
from .incoming import Incoming, Wanted
from .rollout import Step, cheapest, why_not
from .sync_state import NEWEST_ERRORS, SYNC, Failure, Progress, SyncState, canary_1e9, last_sync
from .targets import REVOCATION, TRUST, UPDATE, Target
from .trusted import Expired, TrustedMetadata, View

PAUSED = 3600
"""Seconds between two looks while a packet pauses because it killed processes."""
ROOT_EVERY = 86_400
"""Seconds after which a device asks for a newer root even if nothing is new: whoever holds an old
timestamp key could otherwise keep it from looking."""
FILE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class Synced(Result):
    """What one sync did.

    Args:
        news: Whether the repository had anything new, or something was left to do.
        applied: Digests of the packets that came into force.
        task: Number of the device's task after it.
        requests: Number of requests.
        received: Bytes received.
        failures: Errors of packets. The device serves on without them.
        state: What is kept of it, and reported.
    """

    news: bool
    applied: tuple[str, ...]
    task: int
    requests: int
    received: int
    failures: tuple[Failure, ...]
    state: SyncState


@dataclass
class _Found:
    """What one sync has found so far."""

    news: bool = False
    waiting: str = ""
    step: Progress | None = None
    errors: list[Failure] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    canary: float | None = None
    facts: Facts = field(default_factory=Facts)
    expired: bool = False
    behind: bool = False
    paused: bool = False


class Client:
    """The client of one store.

    Args:
        store: The device's directory.
        url: Of the repository. None takes the one of the device's identity.
        link: How to reach it.
        clock: Unix seconds now.
        fetcher: In place of one made from `link`.
        device: The store, if this process has opened it. None opens it when it is needed.
    """

    def __init__(
        self,
        store: Path | str,
        url: str | None = None,
        link: Link | None = None,
        clock: Callable[[], float] = time.time,
        fetcher: Fetcher | None = None,
        device: Device | None = None,
    ) -> None:
        self._store, self._clock = Store(Path(store)), clock
        self.identity = identity(self._store.path)
        if not (found := url or self.identity.url):
            raise UsageError(
                "the URL of the fleet repository is missing: name it, or keep it with "
                "sdlora-edge device configure --url URL"
            )
        self.fetcher = fetcher or Fetcher(link)
        self._folder = self._store.path / "fleet"
        self._metadata = TrustedMetadata(self._store.path, found, self.fetcher)
        self._incoming = Incoming(self._folder / "incoming", self._store.path)
        self._device = device

    def trust(self, root: bytes) -> None:
        """Keep the root of trust of the repository (`1.root.json`). Raises TrustError."""
        self._metadata.anchor(root)

    def sync(self) -> Synced:
        """Look once, and take what this device may take.

        Raises:
            LinkError: The repository cannot be reached.
            TrustError: It is not what it must be, or has expired.
            HealthError, InputError, NotForThisDevice, ResourceError: As `Device.apply_all`. What
                was found is kept all the same.
        """
        found, handled = _Found(), self._handled()
        try:
            with self._store.lock("sync.lock"):
                self._metadata.sweep()
                self._sync(found, handled)
        except UsageError:  # another process syncs
            raise
        except SdloraError as error:
            found.expired = isinstance(error, Expired)
            self._fail(found, error)
            if found.step is None:
                self._as_before(found)
            self._keep(found)
            raise
        state = self._keep(found)
        return Synced(
            found.news,
            tuple(found.applied),
            found.facts.task,
            self.fetcher.requests,
            self.fetcher.received,
            tuple(found.errors),
            state,
        )

    def _sync(self, found: _Found, handled: Handled) -> None:
        clock = self._now(found)
        stamp = self._metadata.look(clock)
        if stamp is not None and self._is_done(handled, stamp.snapshot, clock):
            self._as_before(found)
            found.facts = handled.facts
            return
        found.news = True
        with self._metadata.refresh(clock) as view:
            found.facts = self._follow(view, found, handled)
            after = Handled(
                view.snapshot,
                self._standing(),
                self._wakes(view, found, clock),
                int(clock),
                tuple(dict.fromkeys(found.failed))[-MOST_FAILED:],
                found.facts,
            )
        self._incoming.keep(set())
        atomic.write(self._folder / HANDLED, after.to_json(), like=self._store.path)

    def _wakes(self, view: View, found: _Found, clock: float) -> int:
        """Unix seconds when there is something to do even if nothing is new; 0 if never."""
        planned = view.plan(self.identity.channel).wakes(clock)
        again = int(clock) + PAUSED if found.paused else None
        return min((when for when in (planned, again) if when), default=0)

    def _as_before(self, found: _Found) -> None:
        """Where the device stands in the roll-out, if nothing new was learnt of it."""
        if before := last_sync(self._store.path):
            found.step, found.waiting = before.step, before.waiting

    def _now(self, found: _Found) -> float:
        """The latest of the clock and of what the repository has signed, in Unix seconds."""
        clock, stamp = self._clock(), self._metadata.stamp()
        signed = stamp.signed_at if stamp else 0
        found.behind = clock < signed
        return max(clock, signed)

    def _is_done(self, handled: Handled, snapshot: int, clock: float) -> bool:
        return (
            (handled.snapshot, handled.standing) == (snapshot, self._standing())
            and not 0 < handled.wakes <= clock
            and 0 <= clock - handled.root_checked < ROOT_EVERY
        )

    def _standing(self) -> str:
        """Changes with the store's record, the identity and the program."""
        now, who = self._store.current(), self.identity
        return sha256(
            dump_json([now.counter, now.digests, who.id, who.channel, who.groups, __version__])
        )

    def _follow(self, view: View, found: _Found, handled: Handled) -> Facts:
        if handled.standing == self._standing():
            facts = handled.facts
            found.failed += handled.failed
        else:
            facts = Facts.of(self._opened())
        targets = [
            t
            for t in view.targets
            if t.published.lineage in (facts.lineage, "") and t.digest not in found.failed
        ]
        facts = self._take_controls(view, targets, facts, found)
        while way := self._way(
            view, [t for t in targets if t.digest not in found.failed], facts, found
        ):
            failed = len(found.failed)
            facts = self._take(view, way, found)
            if len(found.failed) == failed:
                break
            # else there may be another way, such as the same packet signed by other keys
        return facts

    def _take_controls(
        self, view: View, targets: Sequence[Target], facts: Facts, found: _Found
    ) -> Facts:
        """New keys, one version after the other, and revocations.

        A revocation may be signed by keys that newer ones replace. So those that the keys in force
        have signed come before the next keys, and all that are left after the last.
        """
        for keys in (*_new_keys(targets, self._store.current(), facts.keys), None):
            for one in _revocations(targets, self._store.current(), found.failed):
                if keys is None or self._is_signed(view, one):
                    facts = self._take(view, [one], found)
            if keys is not None:
                facts = self._take(view, [keys], found)
        return facts

    def _is_signed(self, view: View, target: Target) -> bool:
        """Whether the keys in force have signed a packet."""
        data = atomic.read(self._incoming.fetch(_wanted(view, target, self.fetcher)))
        try:
            read_any(data, self._opened().trust)
        except TrustError:
            return False
        return True

    def _way(
        self, view: View, targets: Sequence[Target], facts: Facts, found: _Found
    ) -> list[Target]:
        """The packets that lead to where this device may go now."""
        who, clock = self.identity, self._now(found)
        plan = view.plan(who.channel)
        step = plan.allowed(who.id, who.groups, clock)
        done = step is not None and step.to in facts.states
        rest = plan.steps[plan.steps.index(step) + done :] if step else plan.steps
        found.step = _progress(next(iter(rest or plan.steps[-1:]), None), who)
        if step is None or done:
            found.waiting = why_not(rest, clock)
            return []
        usable = {t.path: t for t in targets if t.published.kind == UPDATE}
        now, held_back = self._store.current(), plan.held_back(step)
        edges = [
            t.edge for t in usable.values() if not _revoked(t, now) and t.digest not in held_back
        ]
        try:
            return [usable[edge.path] for edge in cheapest(edges, facts.states[-1], step.to)]
        except NotForThisDevice as error:
            if not found.failed:  # else it was told when the packet failed
                self._fail(found, error)
            found.waiting = found.waiting or str(error)
            return []

    def _opened(self) -> Device:
        """The device. It is opened at most once in a sync, and only if it has to be."""
        if self._device is None:
            self._device = Device.open(self._store.path, swap=IN_PLACE)
        return self._device

    def _take(self, view: View, targets: Sequence[Target], found: _Found) -> Facts:
        """Download packets, all of them first, and apply them as one: the facts after it.

        A packet that is refused for good is remembered, and the others are looked at all the same.
        """
        with self._remembered(found) as memory:
            paused = memory.paused().intersection(target.digest for target in targets)
        if paused:
            found.paused, found.waiting = True, f"packet {min(paused)} has killed processes"
            return Facts.of(self._opened())
        files = {t.digest: self._incoming.fetch(_wanted(view, t, self.fetcher)) for t in targets}
        held, device = set(self._store.current().digests), self._opened()
        try:
            with self._remembered(found) as memory:
                found.canary = surviving.apply_all(device, files, memory)
        except (*UNWRITTEN, UsageError):  # no packet is at fault: the disk is full, the store held
            raise
        except SdloraError as error:
            now = set(self._store.current().digests)
            found.failed += [t.digest for t in targets if t.digest not in now][:1]
            self._fail(found, error)
            found.waiting = str(error)
        finally:
            after = set(self._store.current().digests)
            found.applied += [t.digest for t in targets if t.digest in after - held]
        for target in targets:
            self._incoming.drop(target.digest)
        return Facts.of(device)

    def _remembered(self, found: _Found) -> AbstractContextManager[Memory]:
        return surviving.remembered(self._store, lambda error: self._fail(found, error))

    def _fail(self, found: _Found, error: SdloraError) -> None:
        found.errors.append(Failure(int(self._clock()), error.exit_code, str(error)))

    def _keep(self, found: _Found) -> SyncState:
        before = last_sync(self._store.path)
        errors = list(before.errors if before else ())
        for error in found.errors:  # one that comes back with each sync is told once
            if not errors or replace(error, time=errors[-1].time) != errors[-1]:
                errors.append(error)
        canary = canary_1e9(found.canary) if found.canary is not None else None
        state = SyncState(
            int(self._clock()),
            found.news,
            found.waiting,
            found.step,
            tuple(errors[-NEWEST_ERRORS:]),
            canary if canary is not None else (before.canary_1e9 if before else None),
            found.expired,
            found.behind,
        )
        if before is None or replace(state, time=before.time) != before:
            atomic.write(self._store.path / SYNC, state.to_json(), like=self._store.path)
        return state

    def _handled(self) -> Handled:
        try:
            return Handled.from_json(atomic.read(self._folder / HANDLED, FILE_LIMIT))
        except InputError:  # the first time, or damaged: then all is handled again
            return Handled()


def _wanted(view: View, target: Target, fetcher: Fetcher) -> Wanted:
    stream = partial(fetcher.stream, view.url(view.files[target.path]))
    return Wanted(target.digest, target.size, stream)


def _new_keys(targets: Sequence[Target], now: Generation, keys: int) -> list[Target]:
    """Packets of keys that are newer than those in force, oldest first."""
    found = [t for t in targets if t.published.kind == TRUST and t.published.sequence > keys]
    new = [t for t in found if t.digest not in now.digests]
    return sorted(new, key=lambda t: t.published.sequence)


def _revocations(targets: Sequence[Target], now: Generation, failed: Sequence[str]) -> list[Target]:
    """Revocations that are not obeyed yet, in the order in which they follow each other."""
    found = [t for t in targets if t.published.kind == REVOCATION and not _revoked(t, now)]
    new = [t for t in found if t.digest not in failed]
    return sorted(new, key=lambda t: (t.published.revision, t.published.sequence))


def _revoked(target: Target, now: Generation) -> bool:
    named = target.published
    return any(r.covers(named.sequence, named.revision) for r in now.revoked)


def _progress(step: Step | None, who: Identity) -> Progress | None:
    if step is None:
        return None
    return Progress(step.packet, step.percent, step.includes(who.id, who.groups))

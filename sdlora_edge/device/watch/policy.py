"""What a watcher does next. Pure decisions: no disk, no clock, no threads.

What became of a packet is remembered by the digest of its bytes, never by a name or a time:

    applied, or nothing to do    until its file is gone from the folder
    refused, or out of order     until another generation is in force: predecessors may have come
    not signed by trusted keys   until other keys are in force
    canary failed                for good, in the store: a newer packet has to come in its place
    its process was killed       counted, in the store: from the third time on, the packet pauses
                                 for an hour or until the machine restarts. Each further time
                                 doubles the pause, up to a day.
    disk full, store locked      not at all: the watcher tries again, less and less often
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import HealthError, NotForThisDevice, NothingToDo, SdloraError, TrustError
from ...formats.control import Revocation, read_any
from ...formats.packet import Packet
from ...formats.signing import Trust

Verdict = tuple[str, int]
"""a decision against a packet, and what it holds for: one ("generation", counter) or one set of
("keys", version)"""
NEVER: Verdict = "any", 0
"""holds in every generation and with any keys"""
LONGEST_WAIT = 300.0
"""largest number of seconds between two looks while the store cannot be written"""
KILLED_LIMIT = 3
"""A packet pauses once so many processes were killed while they applied it. One power cut is not
the packet's fault, nor is another program that takes all memory."""
PAUSE, LONGEST_PAUSE = 3600, 86_400
"""seconds"""


@dataclass(frozen=True)
class Situation:
    """All that decides which packets to try.

    generation: counter of the generation in force. keys: version of the trusted keys; None if no
    device was opened yet. held: digests that the generation needs, damaged: those of them whose
    file in the store is damaged. left_alone: failed or paused. verdicts: by digest.
    """

    generation: int
    keys: int | None
    held: Collection[str]
    damaged: Collection[str]
    left_alone: Collection[str]
    verdicts: Mapping[str, Verdict]


@dataclass(frozen=True)
class Plan:
    """The digests to try, in the order given. repairing: they replace damaged files."""

    digests: tuple[str, ...]
    repairing: bool


def plan(present: Iterable[str], now: Situation) -> Plan:
    """Choose from the digests of the files in the folder."""
    digests = tuple(digest for digest in present if _due(digest, now))
    repairs = tuple(digest for digest in digests if digest in now.held)
    # Repairs go alone: only then is it known who may sign the others, and what they follow.
    return Plan(repairs or digests, bool(repairs))


def _due(digest: str, now: Situation) -> bool:
    damaged = digest in now.damaged
    if digest in now.left_alone or (digest in now.held and not damaged):
        return False
    verdict = now.verdicts.get(digest)
    if damaged and verdict == NEVER:
        return True  # it was applied once, and is needed again
    return verdict not in (NEVER, ("generation", now.generation), ("keys", now.keys))


def for_good(verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """The verdicts that remain when a repair changes what the device knows."""
    return {digest: verdict for digest, verdict in verdicts.items() if verdict == NEVER}


@dataclass(frozen=True)
class Outcome:
    """What an error means for its packet. event: what to tell, if anything. failed: remember it in
    the store."""

    verdict: Verdict
    event: str | None = None
    failed: bool = False


def outcome(error: SdloraError, generation: int) -> Outcome:
    """Of a packet that the device did not apply in this generation."""
    if isinstance(error, NothingToDo):
        return Outcome(NEVER)
    if isinstance(error, HealthError):
        return Outcome(NEVER, "failed", failed=True)
    event = "waiting" if isinstance(error, NotForThisDevice) else "refused"
    return Outcome(("generation", generation), event)


def unverified(error: SdloraError, keys: int) -> Verdict:
    """Of a file that did not pass `rank`: other keys may come; a damaged file stays damaged."""
    return ("keys", keys) if isinstance(error, TrustError) else NEVER


def rank(data: bytes, digest: str, named: Sequence[str], trust: Trust) -> tuple[int, ...]:
    """Where a packet stands in the order of trying, smaller first.

    Repairs come first, in the store's order: their digest proves them, whoever signs now. Then come
    keys, because what a removed key signed may be forged; then revocations; then updates, in order.

    Args:
        data: the packet's bytes.
        digest: their SHA-256.
        named: digests that the store needs, keys first.
        trust: the keys in force.

    Raises:
        InputError, LimitError, TrustError: the packet is damaged, or its signatures do not hold.
    """
    if digest in named:
        return -1, named.index(digest)
    found = read_any(data, trust)
    if isinstance(found, Packet):
        return 2, found.revision, found.sequence
    return (1,) if isinstance(found, Revocation) else (0, found.trust.version)


def wait_seconds(interval: float, troubles: int) -> float:
    """Seconds until the next look, after so many looks in a row that failed."""
    return min(interval * 2.0**troubles, max(interval, LONGEST_WAIT))


def pause_seconds(killed: int) -> int:
    """How long a packet pauses after so many processes were killed while they applied it."""
    if killed < KILLED_LIMIT:
        return 0
    return min(PAUSE << (killed - KILLED_LIMIT), LONGEST_PAUSE)


def paused(until: int, clock: float) -> bool:
    """Whether a pause still holds. If the clock was set back, no pause grows longer than a day."""
    return 0 < until - clock <= LONGEST_PAUSE

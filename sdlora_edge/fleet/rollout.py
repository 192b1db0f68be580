"""Roll-outs: which devices of a channel may take which packet, and the way there.

`rollout/<channel>.json` in the fleet repository holds one `Plan`. It is signed by the online role
`rollout`, so it may only pace: a device takes no packet that the offline roles have not published,
and none that its own keys have not signed.

Everything here is pure: no disk, no clock, no network.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, NotForThisDevice
from ..formats.canonical import dump_json, parse_exact_json
from ..formats.fields import digest, listed, one_of, record, text, whole
from ..formats.limits import LIMITS
from ..results import Result

FORMAT = "sdlora-edge/rollout/1"
RUNNING, PAUSED, ABORTED = "running", "paused", "aborted"
STATUSES = RUNNING, PAUSED, ABORTED
PARTS = 10_000
"""A device's share is an integer below this: waves are as fine as a hundredth of a percent."""
MOST_STEPS, MOST_WAVES, MOST_GROUPS = 1000, 20, 20
LATEST = 2**40
"""of a time in Unix seconds"""


@dataclass(frozen=True)
class Step(Result):
    """One packet of a channel, and who may take it.

    Attributes:
        packet: SHA-256 of the packet's file.
        to: State digest that the packet leads to.
        sequence: Number of the last task in it.
        waves: Percentages of the channel's devices, ascending.
        wave: The one in force, an index into `waves`.
        groups: Devices in one of these groups may take it whatever the wave.
        not_before: Unix seconds before which nobody takes it.
        success: Percent of the wave's devices that must report success before the next wave.
        error: Percent of the wave's devices with errors at which the step pauses.
        status: RUNNING; PAUSED, so that no further device takes it; or ABORTED for good.
        changed: Unix seconds of the newest change of wave or status.
        reason: Why it is paused or aborted.
    """

    packet: str
    to: str
    sequence: int
    waves: tuple[int, ...] = (1, 10, 50, 100)
    wave: int = 0
    groups: tuple[str, ...] = ()
    not_before: int = 0
    success: int = 95
    error: int = 2
    status: str = RUNNING
    changed: int = 0
    reason: str = ""

    @property
    def percent(self) -> int:
        """Percentage of devices in the wave in force."""
        return self.waves[self.wave]

    @property
    def complete(self) -> bool:
        """Whether every device may take it."""
        return self.status == RUNNING and self.percent == 100

    def includes(self, device: str, groups: Collection[str]) -> bool:
        """Whether a device belongs to the wave in force, or to one of the step's groups."""
        return share(device, self.packet) < PARTS // 100 * self.percent or bool(
            set(groups) & set(self.groups)
        )


_STEP = record(
    {
        "packet": digest,
        "to": digest,
        "sequence": whole(1, LIMITS.sequence),
        "waves": listed(whole(0, 100), 1, MOST_WAVES),
        "wave": whole(0, MOST_WAVES - 1),
        "groups": listed(text(), 0, MOST_GROUPS),
        "not_before": whole(0, LATEST),
        "success": whole(0, 100),
        "error": whole(0, 100),
        "status": one_of(*STATUSES),
        "changed": whole(0, LATEST),
        "reason": text(200),
    }
)
_PLAN = record({"channel": text(), "steps": listed(_STEP, 0, MOST_STEPS)})


@dataclass(frozen=True)
class Plan(Result):
    """The steps of one channel, in the order in which devices take them."""

    channel: str
    steps: tuple[Step, ...] = ()

    def allowed(self, device: str, groups: Collection[str], clock: float) -> Step | None:
        """Find the last step that a device may take.

        A step that the device may not take yet holds back all later ones. Aborted ones do not
        count.

        clock: Unix seconds.
        """
        last = None
        for step in self.steps:
            if step.status == ABORTED:
                continue
            waiting = step.status == PAUSED or clock < step.not_before
            if waiting or not step.includes(device, groups):
                break
            last = step
        return last

    def held_back(self, last: Step) -> set[str]:
        """Packets of steps that are aborted, or that come after the last one allowed."""
        before = self.steps[: self.steps.index(last) + 1]
        allowed = {step.packet for step in before if step.status != ABORTED}
        return {step.packet for step in self.steps} - allowed

    def wakes(self, clock: float) -> int | None:
        """The next `not_before` after the clock, in Unix seconds; None if there is none."""
        return min((s.not_before for s in self.steps if s.not_before > clock), default=None)

    def with_step(self, changed: Step) -> Plan:
        """The same plan with one step replaced, or added at the end."""
        if all(step.packet != changed.packet for step in self.steps):
            return replace(self, steps=(*self.steps, changed))
        steps = tuple(changed if s.packet == changed.packet else s for s in self.steps)
        return replace(self, steps=steps)

    def to_json(self) -> bytes:
        """Canonical JSON."""
        return dump_json({"format": FORMAT, **self.to_dict()})

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """Raises InputError unless `data` is a plan."""
        value = parse_exact_json(data, "a roll-out")
        if (found := value.pop("format", None)) != FORMAT:
            raise InputError(
                f"a roll-out has format {found!r}, not {FORMAT!r}: update this program"
            )
        try:
            _PLAN(value)
            return cls(value["channel"], tuple(_step(entry) for entry in value["steps"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"a roll-out is malformed: {error}") from error


def _step(entry: dict[str, Any]) -> Step:
    lists = {name: tuple(entry[name]) for name in ("waves", "groups")}
    step = Step(**entry | lists)
    if step.wave >= len(step.waves) or list(step.waves) != sorted(step.waves):
        raise ValueError(f"wave {step.wave} of {list(step.waves)}")
    return step


def why_not(steps: Iterable[Step], clock: float) -> str:
    """Why a device does not take the first of these steps; empty if there is none.

    clock: Unix seconds.
    """
    for step in steps:
        if step.status == ABORTED:
            continue
        if step.status == PAUSED:
            return f"the roll-out of task {step.sequence} is paused: {step.reason}"
        if clock < step.not_before:
            return f"the roll-out of task {step.sequence} has not begun"
        return f"the roll-out of task {step.sequence} is at {step.percent} %"
    return ""


def share(device: str, packet: str) -> int:
    """Where a device stands among all devices for a packet: an integer from 0 to PARTS - 1.

    The first eight bytes of SHA-256(device id, line feed, packet digest), big-endian, modulo PARTS.
    So a wave is stable, grows without reshuffling, and no list of devices exists anywhere.
    """
    found = hashlib.sha256(f"{device}\n{packet}".encode()).digest()
    return int.from_bytes(found[:8], "big") % PARTS


@dataclass(frozen=True, order=True)
class Edge:
    """A published packet that leads from one state to another.

    Edges have an order, so that of two ways of one size all devices find the same.

    Attributes:
        path: Target path in the repository.
        begin: State digest that it follows.
        end: State digest that it leads to.
        size: Bytes.
    """

    path: str
    begin: str
    end: str
    size: int


def cheapest(edges: Iterable[Edge], begin: str, end: str) -> tuple[Edge, ...]:
    """Find the packets that lead from one state to another with the fewest bytes.

    Single packets and squashes are edges of one graph (Dijkstra, 1959).

    Raises:
        NotForThisDevice: No packets lead there.
    """
    leaving: dict[str, list[Edge]] = {}
    for edge in edges:
        leaving.setdefault(edge.begin, []).append(edge)
    waiting: list[tuple[int, int, str, tuple[Edge, ...]]] = [(0, 0, begin, ())]
    done: set[str] = set()
    while waiting:
        size, count, state, way = heapq.heappop(waiting)
        if state == end:
            return way
        if state in done:
            continue
        done.add(state)
        for edge in leaving.get(state, ()):
            heapq.heappush(waiting, (size + edge.size, count + 1, edge.end, (*way, edge)))
    raise NotForThisDevice(
        f"no published packets lead from this device's state {begin[:12]} to {end[:12]}: publish "
        "the packets or a squash between them, or flash this device with a newer bundle"
    )

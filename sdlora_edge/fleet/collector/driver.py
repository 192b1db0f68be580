"""Whether a wave goes on, waits or stops: decisions about one step of a roll-out.

Everything here is pure. `driving.Driver` finds the facts and signs what follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...results import Result
from ..rollout import RUNNING, Plan, Step
from .lookups import LOST, NEVER, DeviceRow, Tally

STAY, ADVANCE, PAUSE = "stay", "advance", "pause"
FAILURES = 1, 3, 4, 6
"""Exit codes that speak against a packet. Others speak of the device: its order, its disk."""
LEAST_PREDICTIONS = 200
"""Fewer than this many predictions on a side say nothing about an unknown rate."""
HOUR = 3600
STANDS = "done", "failed", "pending", "awaited", "silent"
"""How a device may stand to a step: see Evidence."""
NONE = Tally()


@dataclass(frozen=True)
class Pace:
    """How the driver paces.

    Attributes:
        soak: Hours for which a wave stays in force at least.
        least: Hours after which a wave goes on in which there is no enrolled device.
        unknown_jump: Percentage points by which the unknown rate may rise.
    """

    soak: float = 24
    least: float = 24
    unknown_jump: float = 10


@dataclass(frozen=True)
class Evidence(Result):
    """How the devices of the wave in force stand.

    Attributes:
        members: Enrolled devices that may take the packet.
        done: Of them, those that reported since `changed` and have the packet, or a later one.
        failed: Those that reported an error since `begun` which speaks against the packet.
        pending: Those that reported since `changed`, neither done nor failed.
        awaited: Those that did not report since `changed`, and are not silent.
        silent: Those that are silent.
        begun: Unix seconds when the step last started or was resumed. Errors before it were
            there when a human let it go on, and do not count again.
        changed: Unix seconds since when the wave is in force.
    """

    members: int
    done: int
    failed: int
    pending: int
    awaited: int
    silent: int
    begun: int
    changed: int


@dataclass(frozen=True)
class Rates:
    """Predictions of devices that have the packet and of those of the channel that do not.

    The ones before are of the same devices, in the days before the step began.
    """

    updated: Tally = NONE
    others: Tally = NONE
    updated_before: Tally = NONE
    others_before: Tally = NONE


@dataclass(frozen=True)
class Decision:
    """STAY, ADVANCE or PAUSE, and why."""

    kind: str
    reason: str


def members(plan: Plan, step: Step, devices: Iterable[DeviceRow], clock: float) -> list[DeviceRow]:
    """The devices that may take a step: it includes them, and no earlier step holds them back."""
    steps = plan.steps[: plan.steps.index(step) + 1]
    until = Plan(plan.channel, steps)
    return [d for d in devices if until.allowed(d.id, d.groups, clock) == step]


def has(plan: Plan, step: Step, device: DeviceRow) -> bool:
    """Whether a device is in the state that a step leads to, or further along."""
    later = {s.to for s in plan.steps[plan.steps.index(step) :]}
    return device.state in later or (device.task or 0) > step.sequence


def weigh(
    plan: Plan, step: Step, devices: Iterable[DeviceRow], begun: int, clock: float
) -> Evidence:
    """Count how the devices of a channel stand to a step.

    Args:
        plan: The channel's.
        step: A running one of it.
        devices: All enrolled devices of the channel.
        begun: See Evidence.
        clock: Unix seconds.
    """
    changed = max(step.changed, step.not_before)
    kinds = [
        _stand(plan, step, device, max(begun, step.not_before), changed)
        for device in members(plan, step, devices, clock)
    ]
    counted = {kind: kinds.count(kind) for kind in STANDS}
    return Evidence(len(kinds), **counted, begun=begun, changed=changed)


def _stand(plan: Plan, step: Step, device: DeviceRow, begun: int, changed: int) -> str:
    if device.last_seen is None or device.last_seen < changed:
        return "silent" if device.condition in (LOST, NEVER) else "awaited"
    if has(plan, step, device):
        return "done"
    against = device.packet in ("", step.packet) and any(
        code in FAILURES and time >= begun for time, code in device.errors
    )
    return "failed" if against else "pending"


def decide(step: Step, found: Evidence, rates: Rates, pace: Pace, clock: float) -> Decision:
    """Say what follows for a step.

    A stop needs no soak: the error share is looked at first, then the unknown rate. Only then may
    the next wave begin. The driver resumes nothing: that is for a human.
    """
    if step.status != RUNNING or clock < step.not_before:
        return Decision(STAY, "not running")
    if found.failed and 100 * found.failed >= step.error * found.members:
        share = 100 * found.failed / found.members
        return Decision(
            PAUSE,
            f"{found.failed} of {found.members} devices failed "
            f"({share:.1f} %, limit {step.error} %)",
        )
    if reason := _jumped(rates, pace.unknown_jump):
        return Decision(PAUSE, reason)
    return _onwards(step, found, pace, clock)


def _onwards(step: Step, found: Evidence, pace: Pace, clock: float) -> Decision:
    if step.wave + 1 == len(step.waves):
        return Decision(STAY, "the last wave")
    hours = (clock - found.changed) / HOUR
    if not found.members:
        if hours < max(pace.soak, pace.least):
            return Decision(STAY, "no enrolled device is in this wave")
        return Decision(ADVANCE, f"no enrolled device is in the wave of {step.percent} %")
    share = 100 * found.done / found.members
    if share < step.success:
        return Decision(STAY, f"{share:.1f} % have it, {step.success} % are needed")
    if hours < pace.soak:
        return Decision(STAY, f"{hours:.1f} of {pace.soak:g} hours have passed")
    return Decision(
        ADVANCE, f"{found.done} of {found.members} devices of the wave of {step.percent} % have it"
    )


def _jumped(rates: Rates, most: float) -> str:
    """Why the unknown rate speaks against a packet; empty if it does not.

    The two sides may differ for other reasons, such as a canary group in a laboratory. So if both
    were counted before too, it is the change of the difference that matters.
    """
    now = _difference(rates.updated, rates.others)
    if now is None:
        return ""
    before = _difference(rates.updated_before, rates.others_before) or 0.0
    if 100 * (now - before) <= most:
        return ""
    texts = [f"{100 * (tally.rate or 0):.1f} %" for tally in (rates.updated, rates.others)]
    return (
        f"the unknown rate rose by {100 * (now - before):.1f} points (limit {most:g}): "
        f"{texts[0]} with the packet, {texts[1]} without"
    )


def _difference(one: Tally, other: Tally) -> float | None:
    if min(one.total, other.total) < LEAST_PREDICTIONS:
        return None
    return one.unknown / one.total - other.unknown / other.total

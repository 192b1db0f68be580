"""Changes of a roll-out: start, pause, resume, advance, abort. Pure: plan in, plan out.

A person calls them through the command line, the collector by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from ..errors import NothingToDo, UsageError
from .rollout import (
    ABORTED,
    LATEST,
    MOST_GROUPS,
    MOST_STEPS,
    MOST_WAVES,
    PAUSED,
    RUNNING,
    Plan,
    Step,
)
from .targets import UPDATE, Target

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""of a channel or a group: part of a file name, a URL and an MQTT topic"""
REASON = 200
"""characters"""


@dataclass(frozen=True)
class Pace:
    """How a packet spreads.

    Attributes:
        waves: Percentages of the channel's devices, ascending to 100.
        groups: Devices in one of these groups take it at once.
        success: Percent of a wave's devices that must report success before the next wave.
        error: Percent of a wave's devices with errors at which the step pauses.
        not_before: Unix seconds before which nobody takes it.
    """

    waves: Sequence[int] = (1, 10, 50, 100)
    groups: Sequence[str] = ()
    success: int = 95
    error: int = 2
    not_before: int = 0


def start(plan: Plan, target: Target, pace: Pace, clock: float) -> Plan:
    """Add a packet at the end of a plan, with its first wave in force.

    Args:
        plan: Of the channel.
        target: A published update.
        pace: How it spreads.
        clock: Unix seconds.

    Raises:
        NothingToDo: The plan has the packet already.
        UsageError: It is no update, or it does not lead on from the plan, or the pace makes no
            sense.
    """
    require_name(plan.channel)
    published = target.published
    if published.kind != UPDATE:
        raise UsageError(
            f"{target.path} is a {published.kind}: only updates are rolled out; devices take "
            "trust packets and revocations as soon as they are published"
        )
    if any(step.packet == target.digest for step in plan.steps):
        raise NothingToDo(f"channel {plan.channel} has {target.path} already: use fleet rollout")
    live = [step for step in plan.steps if step.status != ABORTED]
    if live and live[-1].to == published.end:
        raise NothingToDo(
            f"channel {plan.channel} already leads to the state of task {published.sequence}"
        )
    if len(plan.steps) >= MOST_STEPS:
        raise UsageError(
            f"channel {plan.channel} has {MOST_STEPS} steps: remove old ones with "
            "sdlora-edge fleet prune"
        )
    _require(pace)
    step = Step(
        target.digest,
        published.end,
        published.sequence,
        tuple(pace.waves),
        groups=tuple(pace.groups),
        not_before=pace.not_before,
        success=pace.success,
        error=pace.error,
        changed=int(clock),
    )
    return plan.with_step(step)


def pause(plan: Plan, packet: str, reason: str, clock: float) -> Plan:
    """Let no further device take a packet, nor a later one.

    packet: Its digest.

    Raises:
        NothingToDo: It is paused.
        UsageError: The plan has no such step, or it is aborted.
    """
    step = _live(plan, packet)
    if step.status == PAUSED:
        raise NothingToDo(f"packet {packet[:12]} is paused in channel {plan.channel} already")
    changed = replace(step, status=PAUSED, changed=int(clock), reason=reason[:REASON])
    return plan.with_step(changed)


def resume(plan: Plan, packet: str, clock: float) -> Plan:
    """Let the devices of the wave take a paused packet. Raises as `pause` does."""
    step = _live(plan, packet)
    if step.status == RUNNING:
        raise NothingToDo(f"packet {packet[:12]} is not paused in channel {plan.channel}")
    return plan.with_step(replace(step, status=RUNNING, changed=int(clock), reason=""))


def advance(plan: Plan, packet: str, clock: float) -> Plan:
    """Put the next wave in force.

    Raises:
        NothingToDo: The last wave is in force.
        UsageError: The step is paused or aborted, or the plan has no such step.
    """
    step = _live(plan, packet)
    if step.status == PAUSED:
        raise UsageError(
            f"packet {packet[:12]} is paused in channel {plan.channel} ({step.reason}): resume it "
            "first"
        )
    if step.wave + 1 == len(step.waves):
        raise NothingToDo(f"packet {packet[:12]} has reached {step.percent} %, its last wave")
    return plan.with_step(replace(step, wave=step.wave + 1, changed=int(clock)))


def abort(plan: Plan, packet: str, reason: str, clock: float) -> Plan:
    """End a step for good. Devices that have the packet keep it until a revocation.

    Raises:
        NothingToDo: It is aborted.
        UsageError: The plan has no such step.
    """
    step = _step(plan, packet)
    if step.status == ABORTED:
        raise NothingToDo(f"packet {packet[:12]} is aborted in channel {plan.channel} already")
    changed = replace(step, status=ABORTED, changed=int(clock), reason=reason[:REASON])
    return plan.with_step(changed)


def without_covered(plan: Plan) -> Plan:
    """The plan without completed steps that a later completed step covers.

    Devices that take the later one pass the state of the earlier one on their way.
    """
    done = 0
    for place, step in enumerate(plan.steps):
        if step.status == ABORTED:
            continue
        if not step.complete:
            break
        done = place
    kept = [s for place, s in enumerate(plan.steps) if place >= done or s.status == ABORTED]
    return replace(plan, steps=tuple(kept))


def percentages(text: str) -> tuple[int, ...]:
    """Read waves such as `1,10,50,100`. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"waves {text!r}: give percentages such as 1,10,50,100") from error


def moment(text: str) -> int:
    """Read an ISO 8601 time as Unix seconds. Without an offset it is local time.

    Raises:
        UsageError: It is no such time.
    """
    try:
        # Python 3.10 does not read the Z
        return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp())
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{text!r} is no time: give one such as 2026-12-01T06:00Z or 2026-12-01T06:00+09:00"
        ) from error


def require_name(name: str) -> None:
    """Raises UsageError unless `name` may be that of a channel or a group."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"the name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-', such as line-3"
        )


def _require(pace: Pace) -> None:
    waves = list(pace.waves)
    if not waves or len(waves) > MOST_WAVES or waves != sorted(set(waves)) or waves[-1] != 100:
        raise UsageError(
            f"waves {','.join(map(str, waves))}: name at most {MOST_WAVES} percentages that rise "
            "to 100, such as 1,10,50,100"
        )
    if waves[0] < 0:
        raise UsageError(f"a wave of {waves[0]} %: choose 0 to 100")
    if len(pace.groups) > MOST_GROUPS:
        raise UsageError(f"{len(pace.groups)} groups: name at most {MOST_GROUPS}")
    for group in pace.groups:
        require_name(group)
    for name, percent in (("success", pace.success), ("error", pace.error)):
        if not 0 <= percent <= 100:
            raise UsageError(f"--{name} {percent}: choose a percentage between 0 and 100")
    if not 0 <= pace.not_before <= LATEST:
        raise UsageError(f"--not-before {pace.not_before}: choose a time in Unix seconds")


def _step(plan: Plan, packet: str) -> Step:
    for step in plan.steps:
        if step.packet == packet:
            return step
    raise UsageError(
        f"channel {plan.channel} has no packet {packet[:12]}: sdlora-edge fleet rollout status "
        "lists those it has"
    )


def _live(plan: Plan, packet: str) -> Step:
    step = _step(plan, packet)
    if step.status == ABORTED:
        raise UsageError(
            f"packet {packet[:12]} was aborted in channel {plan.channel}: publish another revision"
        )
    return step

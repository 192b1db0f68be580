"""Changes of a roll-out, and what a repository may forget: both pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdlora_edge.errors import NothingToDo, UsageError
from sdlora_edge.fleet import pacing
from sdlora_edge.fleet.pacing import Pace
from sdlora_edge.fleet.pruning import stranded, superfluous
from sdlora_edge.fleet.rollout import ABORTED, PAUSED, RUNNING, Plan, cheapest
from sdlora_edge.fleet.targets import BUNDLE, TRUST, UPDATE, Published, Target

STATES = [f"{i:064x}" for i in range(12)]


def target(begin: int, end: int, size: int = 10, kind: str = UPDATE) -> Target:
    """An update from one task's state to another's, or the bundle of `end`."""
    says = Published(
        kind, STATES[0], STATES[begin] if kind == UPDATE else "", STATES[end], end, 0, ""
    )
    digest = f"{begin:032x}{end:024x}{size:07x}{'b' if kind == BUNDLE else 'a'}"
    return Target(f"packets/{begin}-{end}", size, digest, says)


FIRST, SECOND, THIRD = (target(i, i + 1) for i in range(3))


def started(*targets: Target, pace: Pace = Pace()) -> Plan:
    plan = Plan("line-3")
    for one in targets:
        plan = pacing.start(plan, one, pace, 7)
    return plan


def finished(plan: Plan, one: Target) -> Plan:
    for _ in range(3):
        plan = pacing.advance(plan, one.digest, 8)
    return plan


def test_a_roll_out_from_its_start_to_its_end() -> None:
    plan = started(FIRST, pace=Pace(groups=("canary",), success=90, error=5, not_before=3))
    (step,) = plan.steps
    assert (step.to, step.sequence, step.percent) == (STATES[1], 1, 1)
    assert (step.groups, step.success, step.error, step.not_before) == (("canary",), 90, 5, 3)
    plan = pacing.advance(plan, FIRST.digest, 9)
    assert (plan.steps[0].percent, plan.steps[0].changed) == (10, 9)
    plan = pacing.pause(plan, FIRST.digest, "x" * 300, 10)
    assert (plan.steps[0].status, len(plan.steps[0].reason)) == (PAUSED, 200)
    with pytest.raises(NothingToDo):
        pacing.pause(plan, FIRST.digest, "", 10)
    with pytest.raises(UsageError, match="resume it first"):
        pacing.advance(plan, FIRST.digest, 10)
    plan = pacing.resume(plan, FIRST.digest, 11)
    assert (plan.steps[0].status, plan.steps[0].reason) == (RUNNING, "")
    for _ in range(2):
        plan = pacing.advance(plan, FIRST.digest, 12)
    assert plan.steps[0].complete
    with pytest.raises(NothingToDo, match="100 %"):
        pacing.advance(plan, FIRST.digest, 12)
    plan = pacing.abort(plan, FIRST.digest, "bad", 13)
    assert plan.steps[0].status == ABORTED
    for change in (pacing.resume, pacing.advance):
        with pytest.raises(UsageError, match="was aborted"):
            change(plan, FIRST.digest, 14)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "pace",
    [
        Pace(waves=()),
        Pace(waves=(1, 50)),
        Pace(waves=(50, 10, 100)),
        Pace(waves=(10, 10, 100)),
        Pace(waves=(-1, 100)),
        Pace(waves=tuple(range(80, 101))),
        Pace(success=101),
        Pace(error=-1),
        Pace(not_before=-1),
        Pace(groups=("a b",)),
        Pace(groups=("../x",)),
    ],
)
def test_a_pace_that_makes_no_sense_is_refused(pace: Pace) -> None:
    with pytest.raises(UsageError):
        started(FIRST, pace=pace)


def test_a_packet_comes_once_and_only_updates_do() -> None:
    plan = started(FIRST)
    with pytest.raises(NothingToDo, match="already"):
        pacing.start(plan, FIRST, Pace(), 0)
    with pytest.raises(NothingToDo, match="already leads to"):
        pacing.start(plan, target(0, 1, 20), Pace(), 0)
    with pytest.raises(UsageError, match="only updates"):
        pacing.start(
            plan, replace(SECOND, published=replace(SECOND.published, kind=TRUST)), Pace(), 0
        )
    with pytest.raises(UsageError, match="use 1 to 64"):
        pacing.start(Plan("a/b"), FIRST, Pace(), 0)
    with pytest.raises(UsageError, match="has no packet"):
        pacing.pause(plan, SECOND.digest, "", 0)


def test_times_and_percentages_that_people_write() -> None:
    assert pacing.moment("2026-12-01T06:00Z") == pacing.moment("2026-12-01T15:00+09:00")
    assert pacing.percentages("0,10,100") == (0, 10, 100)
    for text in ("", "soon", "2026-13-01"):
        with pytest.raises(UsageError, match="is no time"):
            pacing.moment(text)
    with pytest.raises(UsageError, match="give percentages"):
        pacing.percentages("1;10")


def test_only_completed_steps_that_a_later_completed_one_covers_are_forgotten() -> None:
    plan = finished(started(FIRST, SECOND, THIRD), FIRST)
    assert pacing.without_covered(plan) == plan, "nothing later is complete"
    plan = finished(plan, SECOND)
    kept = pacing.without_covered(plan)
    assert [step.packet for step in kept.steps] == [SECOND.digest, THIRD.digest]
    for device in map(str, range(50)):
        assert kept.allowed(device, (), 99) == plan.allowed(device, (), 99)
    aborted = pacing.abort(plan, FIRST.digest, "bad", 9)
    assert pacing.without_covered(aborted) == aborted, "what was aborted stays to be seen"


def reachable(targets: list[Target], begin: int, end: int) -> bool:
    return bool(
        cheapest(
            [t.edge for t in targets if t.published.kind == UPDATE], STATES[begin], STATES[end]
        )
    )


def test_a_squash_replaces_packets_that_no_bundle_and_no_step_needs() -> None:
    bundle, singles = target(0, 0, kind=BUNDLE), [target(i, i + 1) for i in range(6)]
    squash = target(0, 5, 30)
    everything = [bundle, *singles, squash]
    gone = superfluous(everything, [], ())
    assert gone == singles[:5]
    assert stranded(everything, gone) == [1, 2, 3, 4]
    left = [one for one in everything if one not in gone]
    assert reachable(left, 0, 6)

    plan = started(singles[2])
    kept = [one for one in everything if one not in superfluous(everything, [plan], ())]
    assert singles[2] in kept, "a step names it"
    assert reachable(kept, 3, 6), "devices stand where the step leads to"
    assert reachable(kept, 0, 3)

    kept = [one for one in everything if one not in superfluous(everything, [], [STATES[2]])]
    assert reachable(kept, 2, 6), "a device stands there"

    second = target(0, 4, kind=BUNDLE)
    kept = [
        one
        for one in [*everything, second]
        if one not in superfluous([*everything, second], [], ())
    ]
    assert reachable(kept, 4, 6), "devices are flashed with that bundle"


def test_without_a_squash_nothing_goes_and_a_squash_never_goes_for_its_parts() -> None:
    bundle, singles = target(0, 0, kind=BUNDLE), [target(i, i + 1) for i in range(4)]
    assert superfluous([bundle, *singles], [], ()) == []
    assert superfluous([bundle, *singles[:2], target(0, 4), *singles[2:]], [], ()) == singles
    small, large = target(0, 3), target(0, 4)
    assert superfluous([bundle, *singles, small, large], [], ()) == [*singles, small]

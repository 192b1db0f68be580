"""When a wave goes on, waits and stops: pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cameras import NOW, digest

from sdlora_edge.fleet.collector.driver import (
    ADVANCE,
    PAUSE,
    STAY,
    Evidence,
    Pace,
    Rates,
    decide,
    weigh,
)
from sdlora_edge.fleet.collector.lookups import DeviceRow, Tally
from sdlora_edge.fleet.rollout import ABORTED, PAUSED, Plan, Step

HOUR = 3600
OLD, NEW, LATER = digest("old"), digest("new"), digest("later")
PACKET = digest("packet")
STEP = Step(PACKET, NEW, 5, waves=(50, 100), changed=NOW)
PLAN = Plan("line-3", (STEP,))
SOAKED = NOW + 25 * HOUR
PACE = Pace()
NOTHING = Rates()


def device(number: int, **changes: object) -> DeviceRow:
    usual = DeviceRow(
        id=f"{number:032x}",
        name=f"camera {number}",
        channel="line-3",
        groups=(),
        condition="fine",
        task=4,
        task_name="",
        revision=0,
        state=OLD,
        lineage=digest("lineage"),
        packets=4,
        last_seen=NOW + HOUR,
        online=None,
        waiting="",
        failure="",
        code=None,
        damage=0,
        unknown=0,
        total=0,
        packet=PACKET,
        included=True,
        errors=(),
    )
    return replace(usual, **changes)


def inside(count: int, step: Step = STEP) -> list[int]:
    """Numbers of devices in the step's wave."""
    return [i for i in range(20 * count) if step.includes(f"{i:032x}", ())][:count]


def outside(count: int) -> list[int]:
    return [i for i in range(20 * count) if not STEP.includes(f"{i:032x}", ())][:count]


def fleet(done: int = 0, failed: int = 0, pending: int = 0, awaited: int = 0) -> list[DeviceRow]:
    """Devices of the wave that stand so, and some that are not in it."""
    numbers = iter(inside(done + failed + pending + awaited))
    found = [device(next(numbers), state=NEW, task=5) for _ in range(done)]
    found += [device(next(numbers), errors=((NOW + 60, 6),)) for _ in range(failed)]
    found += [device(next(numbers)) for _ in range(pending)]
    found += [device(next(numbers), last_seen=NOW - 60) for _ in range(awaited)]
    return found + [device(i, errors=((NOW + 60, 6),)) for i in outside(5)]


def judged(devices: list[DeviceRow], step: Step = STEP, clock: float = SOAKED) -> tuple[str, str]:
    evidence = weigh(Plan("line-3", (step,)), step, devices, step.changed, clock)
    decision = decide(step, evidence, NOTHING, PACE, clock)
    return decision.kind, decision.reason


def test_a_wave_goes_on_once_enough_devices_have_the_packet_and_the_time_has_passed() -> None:
    assert judged(fleet(done=19, pending=1))[0] == ADVANCE
    assert judged(fleet(done=18, pending=2)) == (STAY, "90.0 % have it, 95 % are needed")
    assert judged(fleet(done=20), clock=NOW + 23 * HOUR)[0] == STAY
    last = replace(STEP, wave=1)
    assert judged(fleet(done=20)[:20], last) == (STAY, "the last wave")


def test_silent_devices_are_not_done() -> None:
    assert judged(fleet(done=19, awaited=1))[0] == ADVANCE
    assert judged(fleet(done=18, awaited=2))[0] == STAY
    late = [replace(d, state=NEW, task=5, last_seen=NOW - 1) for d in fleet(awaited=20)]
    assert judged(late)[0] == STAY, "they have it, but did not report since the wave began"
    lost = [replace(d, condition="silent") for d in fleet(awaited=3)]
    evidence = weigh(PLAN, STEP, lost, NOW, SOAKED)
    assert evidence == Evidence(3, 0, 0, 0, 0, 3, NOW, NOW)


def test_too_many_failures_pause_at_once_and_devices_outside_do_not_count() -> None:
    assert judged(fleet(done=98, failed=1, pending=1), clock=NOW + 60)[0] == STAY
    kind, reason = judged(fleet(done=98, failed=2), clock=NOW + 60)
    assert (kind, reason) == (PAUSE, "2 of 100 devices failed (2.0 %, limit 2 %)")
    assert judged(fleet(failed=1), clock=NOW + 60)[0] == PAUSE, "one of one"
    none = replace(STEP, error=0)
    assert judged(fleet(done=3), none)[0] == ADVANCE, "no failure is below every limit"
    assert judged(fleet(done=500, failed=1), none)[0] == PAUSE


@pytest.mark.parametrize(
    ("code", "stand"), [(1, 1), (3, 1), (4, 1), (6, 1), (5, 0), (8, 0), (2, 0)]
)
def test_only_some_errors_speak_against_a_packet(code: int, stand: int) -> None:
    (number,) = inside(1)
    found = weigh(PLAN, STEP, [device(number, errors=((NOW + 1, code),))], NOW, SOAKED)
    assert (found.failed, found.pending) == (stand, 1 - stand)


def test_errors_of_another_packet_or_before_the_step_do_not_count() -> None:
    (number,) = inside(1)
    other = device(number, errors=((NOW + 1, 6),), packet=digest("another"))
    before = device(number, errors=((NOW - 1, 6),))
    for one in (other, before):
        assert weigh(PLAN, STEP, [one], NOW, SOAKED).failed == 0
    # the driver advanced the wave meanwhile: the error is of this step all the same
    assert weigh(PLAN, STEP, [before], NOW - 100, SOAKED).failed == 1


def test_a_device_that_recovers_or_flaps_is_what_it_was_last() -> None:
    (number,) = inside(1)
    failed = device(number, errors=((NOW + 60, 6),))
    recovered = replace(failed, state=NEW, task=5)
    back = replace(failed, errors=((NOW + 60, 6), (NOW + 120, 6)))
    stands = [weigh(PLAN, STEP, [one], NOW, SOAKED) for one in (failed, recovered, back)]
    assert [(s.done, s.failed) for s in stands] == [(0, 1), (1, 0), (0, 1)]
    # a human resumed the step: `changed` is newer than these errors
    resumed = replace(STEP, changed=NOW + 600)
    again = weigh(Plan("line-3", (resumed,)), resumed, [back], resumed.changed, SOAKED)
    assert (again.failed, again.pending + again.awaited) == (0, 1)


def test_who_is_further_along_is_done() -> None:
    later = Step(digest("packet 6"), LATER, 6, changed=NOW)
    plan = Plan("line-3", (STEP, later))
    numbers = inside(3)
    devices = [
        device(numbers[0], state=LATER, task=6),
        device(numbers[1], state=digest("a later bundle"), task=7),
        device(numbers[2], state=digest("a branch"), task=5),
    ]
    assert weigh(plan, STEP, devices, NOW, SOAKED).done == 2


def test_an_earlier_step_holds_devices_back() -> None:
    both = [i for i in inside(200) if i in inside(200, replace(STEP, packet=digest("6")))]
    later = replace(STEP, packet=digest("6"), to=LATER, sequence=6)
    for status, members in (("running", len(both)), (PAUSED, 0), (ABORTED, 200)):
        first = replace(STEP, status=status)
        plan = Plan("line-3", (first, later))
        devices = [device(i) for i in inside(200, later)]
        assert weigh(plan, later, devices, NOW, SOAKED).members == members, status


def test_groups_belong_to_the_wave_whatever_its_percentage() -> None:
    step = replace(STEP, waves=(0, 100), groups=("canary",))
    devices = [device(i, groups=("canary",), state=NEW, task=5) for i in range(3)]
    devices += [device(i) for i in range(3, 30)]
    found = weigh(Plan("line-3", (step,)), step, devices, NOW, SOAKED)
    assert (found.members, found.done) == (3, 3)
    assert judged(devices, step)[0] == ADVANCE


def test_a_wave_without_any_device_ends_after_its_least_time() -> None:
    nobody = replace(STEP, waves=(0, 100))
    assert judged(fleet(done=3), nobody, NOW + 23 * HOUR)[0] == STAY
    kind, reason = judged(fleet(done=3), nobody, NOW + 24 * HOUR)
    assert (kind, reason) == (ADVANCE, "no enrolled device is in the wave of 0 %")
    slow = decide(nobody, Evidence(0, 0, 0, 0, 0, 0, NOW, NOW), NOTHING, Pace(0, 48), SOAKED)
    assert slow.kind == STAY


def test_a_step_that_is_paused_aborted_or_not_begun_is_left_alone() -> None:
    for step in (
        replace(STEP, status=PAUSED),
        replace(STEP, status=ABORTED),
        replace(STEP, not_before=int(SOAKED) + 1),
    ):
        found = Evidence(10, 0, 10, 0, 0, 0, NOW, NOW)
        assert decide(step, found, NOTHING, PACE, SOAKED).kind == STAY
    begun = replace(STEP, not_before=NOW + 20 * HOUR)
    devices = [replace(d, last_seen=NOW + 21 * HOUR) for d in fleet(done=10)]
    assert judged(devices, begun)[0] == STAY, "the soak begins when devices may take it"
    assert judged(devices, begun, NOW + 45 * HOUR)[0] == ADVANCE


GOOD = Evidence(10, 10, 0, 0, 0, 0, NOW, NOW)


def test_a_jump_of_the_unknown_rate_pauses() -> None:
    rates = Rates(Tally(1000, 190), Tally(5000, 150))
    decision = decide(STEP, GOOD, rates, PACE, NOW + 60)
    assert decision.kind == PAUSE
    assert decision.reason == (
        "the unknown rate rose by 16.0 points (limit 10): 19.0 % with the packet, 3.0 % without"
    )
    assert decide(STEP, GOOD, rates, Pace(unknown_jump=20), SOAKED).kind == ADVANCE


@pytest.mark.parametrize("few", ["updated", "others"])
def test_few_predictions_say_nothing(few: str) -> None:
    rates = Rates(Tally(200, 100), Tally(200, 0))
    assert decide(STEP, GOOD, rates, PACE, SOAKED).kind == PAUSE
    less = replace(rates, **{few: Tally(199, 100 if few == "updated" else 0)})
    assert decide(STEP, GOOD, less, PACE, SOAKED).kind == ADVANCE


def test_what_differed_before_is_no_jump() -> None:
    """The canary group sees harder images, with the packet and without it."""
    now = Rates(Tally(1000, 250), Tally(1000, 50))
    before = replace(now, updated_before=Tally(1000, 240), others_before=Tally(1000, 60))
    assert decide(STEP, GOOD, now, PACE, SOAKED).kind == PAUSE
    assert decide(STEP, GOOD, before, PACE, SOAKED).kind == ADVANCE
    # everywhere it got dark: that is not the packet's doing
    dark = Rates(Tally(1000, 500), Tally(1000, 480), Tally(1000, 20), Tally(1000, 20))
    assert decide(STEP, GOOD, dark, PACE, SOAKED).kind == ADVANCE
    # easy images before: the difference is the same, and yet the packet made it
    hidden = Rates(Tally(1000, 150), Tally(1000, 100), Tally(1000, 20), Tally(1000, 150))
    assert decide(STEP, GOOD, hidden, PACE, SOAKED).kind == PAUSE

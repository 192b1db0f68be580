"""Roll-out plans and the way between states: pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdlora_edge.errors import InputError, NotForThisDevice
from sdlora_edge.fleet.rollout import (
    ABORTED,
    PARTS,
    PAUSED,
    Edge,
    Plan,
    Step,
    cheapest,
    share,
)

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
FIRST, SECOND = Step(A, B, 1), Step(B, C, 2)
DEVICES = [f"{i:032x}" for i in range(4000)]


def test_a_wave_takes_its_percentage_and_a_later_wave_keeps_every_device() -> None:
    before: set[str] = set()
    for wave, percent in enumerate(FIRST.waves):
        inside = {d for d in DEVICES if replace(FIRST, wave=wave).includes(d, ())}
        assert before <= inside
        assert len(inside) == pytest.approx(len(DEVICES) * percent / 100, abs=60)
        before = inside
    assert len(before) == len(DEVICES)


def test_devices_are_shuffled_anew_for_each_packet() -> None:
    first = {d for d in DEVICES if share(d, A) < PARTS // 10}
    second = {d for d in DEVICES if share(d, B) < PARTS // 10}
    assert len(first & second) == pytest.approx(len(DEVICES) / 100, abs=25)


def test_the_share_of_a_device_is_the_documented_one() -> None:
    """Another implementation must find the same devices in the same wave."""
    assert share("0" * 32, A) == 661


def test_a_group_is_in_every_wave() -> None:
    canary = replace(FIRST, waves=(0, 100), groups=("canary",))
    assert canary.includes(DEVICES[0], ("canary", "other"))
    assert not canary.includes(DEVICES[0], ("other",))


@pytest.mark.parametrize("held", [{"status": PAUSED}, {"not_before": 11}, {"waves": (0,)}])
def test_a_step_that_is_held_back_holds_back_later_ones(held: dict[str, object]) -> None:
    everyone = {"waves": (100,)}
    first, second = replace(FIRST, **everyone), replace(SECOND, **everyone)
    assert Plan("x", (first, second)).allowed(DEVICES[0], (), 10) == second
    held_back = replace(second, **held)
    assert Plan("x", (first, held_back)).allowed(DEVICES[0], (), 10) == first
    assert Plan("x", (replace(first, **held), second)).allowed(DEVICES[0], (), 10) is None


def test_an_aborted_step_holds_back_nothing() -> None:
    aborted = replace(FIRST, status=ABORTED)
    assert Plan("x", (aborted, replace(SECOND, waves=(100,)))).allowed("d", (), 0).to == C  # type: ignore[union-attr]


def test_a_plan_knows_when_it_wakes() -> None:
    plan = Plan("x", (replace(FIRST, not_before=50), replace(SECOND, not_before=20)))
    assert (plan.wakes(10), plan.wakes(20), plan.wakes(50)) == (20, 50, None)


def test_a_plan_is_what_was_written() -> None:
    plan = Plan("line-3", (replace(FIRST, groups=("canary",), reason="why"), SECOND))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.with_step(replace(SECOND, wave=1)).steps[1].wave == 1
    assert plan.with_step(replace(SECOND, packet=C)).steps[2].packet == C


@pytest.mark.parametrize(
    "change",
    [{"wave": 4}, {"waves": (10, 1)}, {"waves": (101,)}, {"status": "odd"}, {"sequence": 0}],
)
def test_a_malformed_plan_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Plan.from_json(Plan("x", (replace(FIRST, **change),)).to_json())  # type: ignore[arg-type]


def test_the_cheapest_way_mixes_single_packets_and_squashes() -> None:
    singles = [Edge(f"{i}", str(i), str(i + 1), 100) for i in range(5)]
    small, large = Edge("s", "1", "4", 150), Edge("l", "0", "5", 400)
    assert [e.path for e in cheapest([*singles, small, large], "0", "5")] == ["0", "s", "4"]
    assert [e.path for e in cheapest([*singles, large], "0", "5")] == ["l"]
    assert cheapest(singles, "3", "3") == ()
    with pytest.raises(NotForThisDevice, match="flash this device"):
        cheapest(singles[1:], "0", "5")

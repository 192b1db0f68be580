"""The power is cut at every point of what a device does, in every way a disk allows; it restarts, serves, and goes on."""

from __future__ import annotations

import pytest
from faults.scenarios import NAMES, Fixture
from faults.simulator import torn


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_leaves_the_old_generation_or_the_new(device_life: Fixture, name: str) -> None:
    report = device_life.play(device_life.scenarios()[name])
    assert report.problems == []
    assert report.points >= 7
    assert report.states > report.restarts


@pytest.mark.parametrize("name", ["apply", "repair a damaged packet"])
def test_a_cut_after_a_process_was_killed_does_no_more_harm(
    device_life: Fixture, name: str
) -> None:
    """Killed at every operation; a second process goes on, on what no one has synced; then the power is cut at every point."""
    scenario = device_life.scenarios()[name]
    operations = device_life.play(scenario).operations
    for die_at in range(1, operations + 1):
        assert device_life.play(scenario, die_at=die_at).problems == [], die_at


def test_a_catch_up_that_was_killed_is_completed(device_life: Fixture) -> None:
    """As above, for every seventh operation: there are many."""
    scenario = device_life.scenarios()["catch up"]
    operations = device_life.play(scenario).operations
    for die_at in range(2, operations + 1, 7):
        assert device_life.play(scenario, die_at=die_at).problems == [], die_at


def test_what_a_cut_may_leave_of_a_file() -> None:
    left = torn(b"", b"abcdefgh")
    for expected in (
        b"",
        b"abcdefgh",
        b"ab",
        b"abcd",
        b"abcdefg",
        b"\0\0cdefgh",
        b"ab\xa5\xa5ef\xa5\xa5",
        b"\0" * 8,
    ):
        assert expected in left
    assert torn(b"same", b"same") == [b"same"]
    assert b"abLDef" in torn(b"OOLDOO", b"abcdef")

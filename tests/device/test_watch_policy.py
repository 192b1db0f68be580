"""What a watcher decides, without a disk, a clock or a thread."""

from __future__ import annotations

import pytest

from sdlora_edge.device.watch import policy
from sdlora_edge.device.watch.policy import NEVER, Outcome, Situation, plan
from sdlora_edge.errors import (
    HealthError,
    InputError,
    NotForThisDevice,
    NothingToDo,
    SdloraError,
    TrustError,
)
from sdlora_edge.formats import signing


def situation(
    held: str = "", damaged: str = "", left_alone: str = "", **verdicts: policy.Verdict
) -> Situation:
    """A device in generation 7 with keys of version 2; digests have one letter."""
    return Situation(7, 2, held, damaged, left_alone, verdicts)


@pytest.mark.parametrize(
    ("now", "tried"),
    [
        (situation(), "abc"),
        (situation(held="a"), "bc"),
        (situation(left_alone="b"), "ac"),
        (situation(a=("generation", 7)), "bc"),
        (situation(a=("generation", 6)), "abc"),
        (situation(a=("keys", 2), b=("keys", 1)), "bc"),
        (situation(a=NEVER), "bc"),
        (situation(held="ab", damaged="b"), "b"),
        (situation(held="ab", damaged="b", b=NEVER), "b"),
        (situation(held="ab", damaged="b", b=("generation", 7)), "c"),
        (situation(held="ab", damaged="b", left_alone="b"), "c"),
    ],
)
def test_what_is_tried_next(now: Situation, tried: str) -> None:
    assert "".join(plan("abc", now).digests) == tried


def test_repairs_go_alone_and_outdate_what_was_refused_before_them() -> None:
    assert plan("abc", situation(held="b", damaged="b")) == policy.Plan(("b",), repairing=True)
    assert not plan("abc", situation()).repairing
    assert policy.for_good({"a": ("generation", 7), "b": NEVER, "c": ("keys", 2)}) == {"b": NEVER}


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (NothingToDo("held"), Outcome(NEVER)),
        (HealthError("canary"), Outcome(NEVER, "failed", failed=True)),
        (NotForThisDevice("order"), Outcome(("generation", 7), "waiting")),
        (TrustError("revoked"), Outcome(("generation", 7), "refused")),
        (InputError("damaged"), Outcome(("generation", 7), "refused")),
    ],
)
def test_what_becomes_of_a_packet_that_was_not_applied(error: SdloraError, then: Outcome) -> None:
    assert policy.outcome(error, 7) == then


def test_other_keys_may_verify_a_packet_but_nothing_restores_a_damaged_file() -> None:
    assert policy.unverified(TrustError("unknown key"), 2) == ("keys", 2)
    assert policy.unverified(InputError("no header"), 2) == NEVER


def test_a_repair_comes_first_and_needs_no_signature() -> None:
    nobody, named = signing.Trust((), 1), ["keys", "task 1"]
    assert policy.rank(b"", "task 1", named, nobody) == (-1, 1)
    assert policy.rank(b"", "keys", named, nobody) == (-1, 0)


def test_waits_double_up_to_a_bound() -> None:
    assert [policy.wait_seconds(5.0, n) for n in (0, 1, 2, 30)] == [5, 10, 20, 300]
    assert policy.wait_seconds(3600.0, 30) == 3600


def test_pauses_double_up_to_a_day_and_a_clock_set_back_ends_them() -> None:
    hours = [policy.pause_seconds(n) / 3600 for n in (1, 2, 3, 4, 5, 8, 100)]
    assert hours == [0, 0, 1, 2, 4, 24, 24]
    assert policy.paused(1000, 999.0)
    assert not policy.paused(1000, 1000.0)
    assert not policy.paused(200_000, 1000.0)

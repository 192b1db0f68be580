"""A short run of `make fuzz`'s lives of a device, with seeds of its own."""

from __future__ import annotations

from pathlib import Path

from faults.lives import play
from faults.scenarios import Fixture


def test_whatever_happens_a_device_serves_what_it_says_and_forgets_nothing(device_life: Fixture, tmp_path: Path) -> None:
    """What is checked after every step stands in `Life`."""
    outcomes = play(device_life, tmp_path, range(1000, 1008))
    assert {"done", "TrustError", "NotForThisDevice", "NothingToDo", "HealthError"} <= set(outcomes)

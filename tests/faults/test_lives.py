"""A short run of `make fuzz`'s lives of a device, with seeds of its own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from faults.lives import play
from faults.scenarios import Fixture

SEEDS = (1003, 1010, 1032, 5002)
"""of lives that tell a second record that is not written (the first), a rollback to a damaged packet (1010), a refresh that sees
new counters only (1032), and a packet that was revoked while it was damaged, and served once it was repaired (5002)"""


def test_whatever_happens_a_device_serves_what_it_says_and_forgets_nothing(
    device_life: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is checked after every step stands in `Life`."""
    caplog.set_level(logging.ERROR, "sdlora_edge")  # every program that starts warns of the damage
    outcomes = play(device_life, tmp_path, SEEDS, steps=25)
    assert {"done", "TrustError", "NotForThisDevice", "NothingToDo"} <= set(outcomes)

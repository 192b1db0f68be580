"""The crude check beside the simulator: a real process, killed at random times, over and over, on one store."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from conftest import Fleet
from faults.scenarios import Fixture

from sdlora_edge.device import Device

KILLS = 20
PROGRAM = """
import sys
from sdlora_edge.device import Device
device = Device.open(sys.argv[1], threads=1)
print("open", flush=True)
while True:
    for path in sys.argv[2:][device.status().task:]:
        device.apply(path, allow_older=True)
    while device.status().task:
        device.rollback()
"""


def test_a_process_killed_over_and_over_leaves_a_store_that_serves(
    fleet: Fleet, device_life: Fixture, store: Path
) -> None:
    chance, counter, tasks = random.Random(5), 0, set()  # noqa: S311
    for _ in range(KILLS):
        arguments = [sys.executable, "-c", PROGRAM, str(store), *map(str, fleet.packets)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            time.sleep(chance.uniform(0, 0.15))
            assert process.poll() is None
            process.kill()
        device = Device.open(store, threads=1)
        status = device.status()
        assert device_life.digest(device) == device_life.logits[status.task]
        assert status.generation >= counter
        assert status.damage == ()
        counter = status.generation
        tasks.add(status.task)
    assert counter > KILLS
    assert len(tasks) > 1

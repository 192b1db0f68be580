"""A device under load: a hundred updates, and every answer is wholly of one generation; a dead writer holds no lock."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import Fleet

from sdlora_edge.device import Device
from sdlora_edge.errors import UsageError
from sdlora_edge.selftest.kit import Kit
from sdlora_edge.selftest.load import hot_swap


def test_a_hundred_updates_under_load_fail_no_prediction_and_mix_none(
    fleet: Fleet, tmp_path: Path
) -> None:
    kit = Kit(fleet.bundle, tuple(fleet.packets), tmp_path)
    found = hot_swap(kit, updates=100, threads=2, processes=2)
    assert found.updates == 100
    assert found.predictions > 300
    assert found.generations_seen > 50
    assert min(found.generations_seen_by_other_processes) > 5


def test_the_lock_of_a_killed_writer_is_free(fleet: Fleet, store: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from sdlora_edge.device.store import Store
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""
    device = Device.open(store)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UsageError, match="another process"):
            device.apply(fleet.packets[0])
        holder.kill()
    assert device.apply(fleet.packets[0]).task == 1


def test_refresh_follows_another_process_and_costs_little(fleet: Fleet, store: Path) -> None:
    writer, reader = Device.open(store), Device.open(store)
    assert reader.refresh() is False
    for path in fleet.packets:
        writer.apply(path)
        assert reader.refresh() is True
        assert reader.status() == writer.status()
    writer.rollback()
    assert reader.status().task == 3, "until it is asked to"
    assert reader.refresh() is True
    assert reader.status().task == 2


def test_threads_that_refresh_beside_an_update_never_go_back(fleet: Fleet, store: Path) -> None:
    device, writer = Device.open(store, threads=1), Device.open(store, threads=1)
    seen: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while not done.is_set():
            device.refresh()
            seen.append(device.status().generation)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        for _ in range(5):
            writer.apply(fleet.packets[0], allow_older=True)
            device.rollback()
    finally:
        done.set()
        thread.join()
    assert seen == sorted(seen)
    assert device.status().generation == 11

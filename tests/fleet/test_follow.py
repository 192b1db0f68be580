"""A store from a repository, and the loop that follows one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Fleet
from faulty_server import faulty_server, statuses
from fleet_kit import Made, Server, made, served

from sdlora_edge.cli import main
from sdlora_edge.device.device import Device
from sdlora_edge.errors import LinkError, UsageError
from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.follow import LONGEST_WAIT, Follower
from sdlora_edge.fleet.identity import Changes, configure, identity
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.targets import UPDATE


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet) -> Made:
    site = made(tmp_path, time.time)
    site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
    (tmp_path / "root.json").write_bytes(site.root)
    return site


@pytest.fixture
def server(site: Made) -> Iterator[Server]:
    with served(site.path) as server:
        yield server


def roll_out(site: Made, channel: str = "default") -> None:
    found = [t for t in site.repository.targets() if t.published.kind == UPDATE]
    steps = tuple(Step(t.digest, t.published.end, t.published.sequence, (100,)) for t in found)
    ordered = tuple(sorted(steps, key=lambda step: step.sequence))
    site.repository.set_plan(Plan(channel, ordered), site.online)


def init(server: Server, tmp_path: Path, *more: str) -> int:
    command = ["device", "init", "--from", server.url, "--root", str(tmp_path / "root.json")]
    return main([*command, "--store", str(tmp_path / "store"), *more])


def test_a_store_comes_from_a_repository_and_follows_it(
    site: Made, server: Server, tmp_path: Path, fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert init(server, tmp_path) == 0
    assert identity(store).url == server.url
    assert not (tmp_path / "store.incoming").exists()
    roll_out(site)
    capsys.readouterr()
    assert main(["device", "sync", "--store", str(store), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["applied"]) == len(fleet.packets)
    assert main(["device", "sync", "--store", str(store)]) == 0
    assert "nothing new" in capsys.readouterr().out


def test_a_download_that_was_cut_goes_on(
    site: Made, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora_edge.fleet import fetching, incoming

    monkeypatch.setattr(incoming, "PIECE", 4096)
    stream, budget = fetching.Fetcher.stream, [40_000]

    def cut(self: fetching.Fetcher, url: str, begin: int = 0) -> Iterator[bytes]:
        for chunk in stream(self, url, begin):
            budget[0] -= len(chunk)
            if budget[0] < 0:
                raise LinkError("cut")
            yield chunk

    monkeypatch.setattr(fetching.Fetcher, "stream", cut)
    tries = 1
    while init(server, tmp_path) != 0:
        budget[0] = 40_000
        tries += 1
        assert tries < 60
    monkeypatch.undo()
    size = sum(f.stat().st_size for f in (tmp_path / "store" / "bundle").iterdir())
    assert 1 < tries < 6 + 2 * size / 40_000
    assert Device.verify(tmp_path / "store").intact


def test_init_needs_a_root_and_a_clear_bundle(
    site: Made, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["device", "init", "--from", server.url, "--store", str(tmp_path / "store")]
    assert main(command) == 2
    assert "--root" in capsys.readouterr().err
    assert init(server, tmp_path, "--bundle", "another") == 2
    assert "choose one with --bundle" in capsys.readouterr().err
    assert main(["device", "init", "--store", str(tmp_path / "store")]) == 2
    assert not (tmp_path / "store").exists()


def test_the_process_follows_until_it_is_told_to_stop(
    site: Made, server: Server, tmp_path: Path, fleet: Fleet
) -> None:
    assert init(server, tmp_path) == 0
    status = tmp_path / "status.json"
    command = [sys.executable, "-m", "sdlora_edge", "device", "watch", "--from", server.url]
    command += ["--store", str(tmp_path / "store"), "--interval", "1", "--status", str(status)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    events = iter(process.stderr)
    assert json.loads(next(events))["event"] == "started"
    roll_out(site)
    applied = json.loads(next(events))
    assert (applied["event"], applied["task"]) == ("applied", len(fleet.packets))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    process.stderr.close()
    assert json.loads(status.read_text())["failures"] == []


def test_a_dead_link_is_told_once_and_asked_less_and_less(
    site: Made, tmp_path: Path, fleet: Fleet
) -> None:
    store, events = tmp_path / "store", []
    Device.init(fleet.bundle, store)
    configure(store, Changes(url=f"file://{tmp_path}/nowhere"))
    Client(store).trust(site.root)
    follower = Follower(
        lambda: Client(store), 60.0, emit=lambda event, fields: events.append(event)
    )
    assert 48 <= follower.wait_seconds() <= 72
    for _ in range(12):
        assert follower.look() is None
    assert events == ["trouble"]
    assert 0.8 * LONGEST_WAIT <= follower.wait_seconds() <= 1.2 * LONGEST_WAIT
    configure(store, Changes(url=f"file://{site.path}"))
    assert follower.look() is not None
    assert events == ["trouble", "recovered"]
    assert follower.wait_seconds() <= 72


def test_stop_ends_a_wait(site: Made, tmp_path: Path, fleet: Fleet) -> None:
    store = tmp_path / "store"
    Device.init(fleet.bundle, store)
    configure(store, Changes(url=f"file://{site.path}"))
    follower = Follower(lambda: Client(store), 3600.0, emit=lambda event, fields: None)
    thread = threading.Thread(target=follower.run)
    thread.start()
    follower.stop()
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(UsageError):
        Follower(lambda: Client(store), 0.0)


def test_a_server_may_ask_for_hours(site: Made, tmp_path: Path, fleet: Fleet) -> None:
    store = tmp_path / "store"
    Device.init(fleet.bundle, store)
    configure(store, Changes(url=f"file://{site.path}"))
    Client(store).trust(site.root)
    with faulty_server(site.path) as server:
        server.fault = statuses(503, Retry_After="7200")
        follower = Follower(
            lambda: Client(store, server.url), 60.0, emit=lambda event, fields: None
        )
        assert follower.look() is None
        assert 7200 <= follower.wait_seconds() <= 1.2 * 7200
        assert follower.look() is not None
    assert follower.wait_seconds() <= 72, "it answers again"

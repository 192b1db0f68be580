"""A device follows a fleet repository on a real HTTP server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Fleet
from fleet_kit import Clock, Made, Server, made, served
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.issuing import revoke, sign_packet
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device.device import Device
from sdlora_edge.errors import InputError, LinkError, TrustError
from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.fetching import Fetcher
from sdlora_edge.fleet.identity import Changes, configure
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.sync_state import last_sync
from sdlora_edge.fleet.targets import UPDATE
from sdlora_edge.formats.signing import new_key
from sdlora_edge.train.run import Run

DAY = 86_400


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet, clock: Clock) -> Made:
    """A repository with the bundle and all packets."""
    site = made(tmp_path, clock)
    site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
    return site


@pytest.fixture
def server(site: Made) -> Iterator[Server]:
    with served(site.path) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path, fleet: Fleet) -> Path:
    store = tmp_path / "store"
    Device.init(fleet.bundle, store)
    configure(store, Changes(name="cam", channel="line-3", groups=("canary",)))
    return store


@pytest.fixture
def client(store: Path, site: Made, server: Server, clock: Clock) -> Client:
    client = Client(store, server.url, clock=clock)
    client.trust(site.root)
    return client


def again(client: Client, url: str, clock: Clock) -> Client:
    """The client of another process."""
    return Client(client._store.path, url, clock=clock)


def steps(site: Made, percent: int = 100, groups: tuple[str, ...] = ()) -> tuple[Step, ...]:
    found = sorted(
        (t for t in site.repository.targets() if t.published.kind == UPDATE),
        key=lambda t: t.published.sequence,
    )
    waves = (percent, 100)
    return tuple(
        Step(t.digest, t.published.end, t.published.sequence, waves, groups=groups) for t in found
    )


def test_a_device_catches_up_with_its_channel_in_one_go(
    site: Made, client: Client, fleet: Fleet
) -> None:
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    done = client.sync()
    assert len(done.applied) == len(fleet.packets)
    assert done.task == len(fleet.packets)
    device = Device.open(client._store.path)
    assert device.status().generation == 2  # one commit for all
    assert not list((client._store.path / "fleet" / "incoming").iterdir())


def test_nothing_new_costs_one_small_request(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    client.sync()
    server.requests.clear()
    idle = again(client, server.url, clock)
    done = idle.sync()
    assert server.requests == ["/metadata/timestamp.json"]
    assert not done.news
    assert (done.requests, done.received < 1000) == (1, True)
    site.repository.refresh(site.online)
    assert not again(client, server.url, clock).sync().news  # a new timestamp alone is no news


def test_once_a_day_a_device_asks_for_a_newer_root(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    client.sync()
    clock.now += DAY
    site.repository.refresh(site.online)
    server.requests.clear()
    again(client, server.url, clock).sync()
    assert "/metadata/2.root.json" in server.requests


def test_a_wave_reaches_a_device_when_it_grows(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    (first, *_) = steps(site, 0)
    site.repository.set_plan(Plan("line-3", (first,)), site.online)
    done = client.sync()
    assert not done.applied
    assert done.state.step is not None
    assert (done.state.step.percent, done.state.step.included) == (0, False)
    assert "at 0 %" in done.state.waiting
    site.repository.set_plan(Plan("line-3", (replace(first, wave=1),)), site.online)
    assert again(client, server.url, clock).sync().applied == (first.packet,)


def test_news_for_others_does_not_open_the_model(
    site: Made,
    client: Client,
    server: Server,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.sync()
    first, *_ = steps(site, 0)
    site.repository.set_plan(Plan("line-3", (first,)), site.online)
    monkeypatch.setattr(Device, "open", None)
    done = again(client, server.url, clock).sync()
    assert done.news
    assert "at 0 %" in done.state.waiting


def test_a_group_goes_first_and_a_step_begins_at_its_time(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    first, second, *_ = steps(site, 0, ("canary",))
    later = replace(second, not_before=int(clock.now) + 100)
    site.repository.set_plan(Plan("line-3", (first, later)), site.online)
    assert client.sync().applied == (first.packet,)
    assert not again(client, server.url, clock).sync().news
    clock.now += 100  # nothing was signed since, and the device wakes by itself
    assert again(client, server.url, clock).sync().applied == (second.packet,)


def test_another_channel_is_not_followed(site: Made, client: Client) -> None:
    site.repository.set_plan(Plan("line-4", steps(site)), site.online)
    done = client.sync()
    assert (done.applied, done.state.step, done.state.waiting) == ((), None, "")


def test_a_paused_step_is_not_taken_and_says_why(site: Made, client: Client) -> None:
    first, *_ = steps(site)
    paused = replace(first, status="paused", reason="three canaries failed")
    site.repository.set_plan(Plan("line-3", (paused,)), site.online)
    done = client.sync()
    assert not done.applied
    assert "three canaries failed" in done.state.waiting


def test_the_packet_of_an_aborted_step_is_not_a_way(
    site: Made, client: Client, fleet: Fleet, tmp_path: Path
) -> None:
    """Two packets lead to one state: the canary of one is wrong, and a human has aborted it."""
    copy = tmp_path / "again.sdlora"
    key, _ = new_key("second", tmp_path / "more")
    sign_packet(fleet.packets[0], key, copy)
    site.repository.publish([copy], site.targets_keys, site.online)
    first, second = (s for s in steps(site) if s.sequence == 1)
    for aborted, good in ((first, second), (second, first)):
        plan = Plan("line-3", (replace(aborted, status="aborted"), good))
        site.repository.set_plan(plan, site.online)
        store = tmp_path / aborted.packet[:8]
        Device.init(fleet.bundle, store)
        configure(store, Changes(channel="line-3"))
        one = Client(store, f"file://{site.path}", clock=client._clock)
        one.trust(site.root)
        assert one.sync().applied == (good.packet,)


def test_a_revocation_passes_by_the_waves(
    site: Made, client: Client, fleet: Fleet, server: Server, clock: Clock, tmp_path: Path
) -> None:
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    client.sync()
    last = len(fleet.packets)
    revoke(fleet.bundle, last, 0, fleet.key, tmp_path / "back.sdlora")
    site.repository.publish([tmp_path / "back.sdlora"], site.targets_keys, site.online)
    again(client, server.url, clock).sync()
    assert Device.open(client._store.path).status().task == last - 1
    done = again(client, server.url, clock).sync()
    assert not done.news  # the revoked packet is not tried again


def test_a_lost_or_damaged_cache_is_fetched_again(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    site.repository.set_plan(Plan("line-3", steps(site)[:1]), site.online)
    client.sync()
    folder = client._store.path / "fleet"
    for name in ("root.json", "timestamp.json", "snapshot.json", "targets.json", "rollout.json"):
        for damage in (b"", b"{", (folder / name).read_bytes()[:-40]):
            (folder / name).write_bytes(damage)
            (folder / "handled.json").write_bytes(damage)
            done = again(client, server.url, clock).sync()
            assert (done.applied, done.failures) == ((), ())
    assert Device.open(client._store.path).status().task == 1


def test_an_expired_timestamp_is_reported_and_the_device_serves_on(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    client.sync()
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    clock.now += 400 * DAY
    with pytest.raises(TrustError, match="expired"):
        again(client, server.url, clock).sync()
    state = last_sync(client._store.path)
    assert state is not None
    assert state.metadata_expired
    assert Device.open(client._store.path).status().task == 0


def test_a_clock_before_what_was_signed_is_reported_and_not_used(
    site: Made, client: Client, server: Server, clock: Clock
) -> None:
    client.sync()
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    slow = Clock(1000.0)
    done = Client(client._store.path, server.url, clock=slow).sync()
    assert done.state.clock_behind
    assert done.applied


def test_a_device_that_is_too_old_says_what_to_do(
    site: Made, client: Client, fleet: Fleet, server: Server, clock: Clock, tmp_path: Path
) -> None:
    other = made(tmp_path / "other", clock)
    other.repository.publish([fleet.bundle, *fleet.packets[1:]], other.targets_keys, other.online)
    other.repository.set_plan(Plan("line-3", steps(other)), other.online)
    with served(other.path) as elsewhere:
        lost = Client(client._store.path, elsewhere.url, clock=clock)
        lost.trust(other.root)
        done = lost.sync()
        assert [failure.code for failure in done.failures] == [5]
        assert "flash this device" in done.state.waiting
        assert not again(client, elsewhere.url, clock).sync().news  # it is not tried in vain


def test_without_a_root_of_trust_nothing_is_read(store: Path, server: Server, clock: Clock) -> None:
    with pytest.raises(InputError, match="root of trust"):
        Client(store, server.url, clock=clock).sync()


def test_a_bundle_may_hold_the_root_of_trust(
    site: Made, fleet: Fleet, server: Server, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "root.json").write_bytes(site.root)
    options = ExportOptions(fleet_root=tmp_path / "root.json")
    public = fleet.key.with_suffix(".pub")
    export_bundle(Run.open(fleet.run), tmp_path / "bundle", 0, [str(public)], options)
    Device.init(tmp_path / "bundle", tmp_path / "rooted")
    configure(tmp_path / "rooted", Changes(channel="line-3"))
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    assert Client(tmp_path / "rooted", server.url, clock=clock).sync().applied


def test_without_a_link_the_device_serves_and_tells(store: Path, site: Made, clock: Clock) -> None:
    fetcher = Fetcher(sleep=lambda seconds: None)
    client = Client(store, "http://127.0.0.1:9", clock=clock, fetcher=fetcher)
    client.trust(site.root)
    for _ in range(2):
        with pytest.raises(LinkError, match="cannot be read"):
            client.sync()
    state = last_sync(store)
    assert state is not None
    assert [error.code for error in state.errors] == [8]  # the same error is kept once


def test_a_stick_is_a_repository(site: Made, client: Client, clock: Clock, tmp_path: Path) -> None:
    site.repository.set_plan(Plan("line-3", steps(site)), site.online)
    shutil.copytree(site.path, tmp_path / "stick")
    done = Client(client._store.path, f"file://{tmp_path}/stick", clock=clock).sync()
    assert done.applied

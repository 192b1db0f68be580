"""What may come between a device and its repository: other keys, other roots, a cut at the wrong time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Fleet
from faults.scenarios import Orders
from fleet_kit import Clock, Made, Server, made, served

from sdlora_edge.device.device import Device
from sdlora_edge.device.watch import memory
from sdlora_edge.errors import HealthError, InputError, TrustError, UsageError
from sdlora_edge.fleet import provision
from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.fetching import Fetcher
from sdlora_edge.fleet.identity import Changes, configure, identity
from sdlora_edge.fleet.provision import Source, init_from
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.sync_state import last_sync
from sdlora_edge.fleet.targets import UPDATE

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def orders(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Orders:
    return Orders(fleet, tmp_path_factory.mktemp("orders"))


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet, clock: Clock) -> Made:
    site = made(tmp_path, clock)
    site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
    updates = [t for t in site.repository.targets() if t.published.kind == UPDATE]
    updates.sort(key=lambda t: t.published.sequence)
    steps = [Step(t.digest, t.published.end, t.published.sequence, (100,)) for t in updates]
    site.repository.set_plan(Plan("line-3", tuple(steps)), site.online)
    return site


@pytest.fixture
def server(site: Made) -> Iterator[Server]:
    with served(site.path) as server:
        yield server


@pytest.fixture
def client(tmp_path: Path, fleet: Fleet, site: Made, server: Server, clock: Clock) -> Client:
    store = tmp_path / "store"
    Device.init(fleet.bundle, store)
    configure(store, Changes(name="cam", channel="line-3"))
    client = Client(store, server.url, clock=clock)
    client.trust(site.root)
    return client


def test_a_device_that_was_away_obeys_what_old_keys_revoked_and_takes_new_ones(
    site: Made, client: Client, server: Server, clock: Clock, orders: Orders
) -> None:
    """The revocation was signed before the keys changed; new keys have signed the packets again."""
    site.repository.publish([orders.revocation], site.targets_keys, site.online)
    site.repository.publish([orders.rotation], site.targets_keys, site.online)
    site.repository.publish(orders.renewed[:1], site.targets_keys, site.online)
    done = client.sync()
    status = Device.open(client._store.path).status()
    assert status.trust_version == 2
    assert status.revoked == ((2, 0),)
    plan = site.repository.plan("line-3")
    site.repository.set_plan(replace(plan, steps=plan.steps[:1]), site.online)
    done = Client(client._store.path, server.url, clock=clock).sync()
    assert Device.open(client._store.path).status().task == 1, done


def test_another_root_of_trust_forgets_the_repository_before(
    client: Client, fleet: Fleet, clock: Clock, tmp_path: Path
) -> None:
    client.sync()
    other = made(tmp_path / "other", clock)
    other.repository.publish([fleet.bundle], other.targets_keys, other.online)
    with served(other.path) as elsewhere:
        moved = Client(client._store.path, elsewhere.url, clock=clock)
        moved.trust(other.root)
        assert moved.sync().failures == ()
    with pytest.raises(TrustError):
        moved.trust(b"{}")
    with pytest.raises(InputError, match="role timestamp"):
        moved.trust((other.path / "metadata" / "timestamp.json").read_bytes())


def test_python_tuf_still_has_the_clock_that_is_set() -> None:
    """`trusted` sets a private name, because there is no public one."""
    from tuf.ngclient import Updater
    from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

    assert "reference_time" in TrustedMetadataSet.__init__.__code__.co_names
    assert "_trusted_set" in Updater.__init__.__code__.co_names


def test_a_store_that_was_cut_off_while_it_was_made_is_completed(
    site: Made, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes after the store has its name, and before it knows its repository."""
    store, source = tmp_path / "new", Source(server.url, site.root)
    changes = Changes(url=server.url)

    def cut(store: Path, changes: Changes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(provision, "configure", cut)
        with pytest.raises(KeyboardInterrupt):
            init_from(source, store, Fetcher(), changes)
    init_from(source, store, Fetcher(), changes)
    assert identity(store).url == server.url
    assert Client(store).sync().failures == ()
    with pytest.raises(UsageError, match="exists already"):
        init_from(source, store, Fetcher(), changes)


KILLED = """
import os, signal, sys
from sdlora_edge.device import Device
from sdlora_edge.fleet.client import Client
def killed(self, paths):
    os.kill(os.getpid(), signal.SIGKILL)
Device.apply_all = killed
Client(sys.argv[1], sys.argv[2]).sync()
"""


def test_a_packet_that_kills_its_process_is_left_alone_for_a_while(
    client: Client, server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that takes all memory must not restart a device for ever.

    The first process dies over all packets as one, and nobody knows yet which one is at fault.
    """
    store, died = client._store.path, 0
    while (done := die(store, server.url)).returncode == -signal.SIGKILL and died < 10:
        died += 1
    assert (done.returncode, died) == (0, 4), done.stderr.decode()
    state = last_sync(store)
    assert state is not None
    assert "has killed processes" in state.waiting
    assert [error.code for error in state.errors] == [HealthError.exit_code]
    assert Device.open(store).status().task == 0, "it serves"

    before, clock.now = len(server.requests), time.time()
    assert Client(store, server.url, clock=clock).sync().applied == ()
    assert len(server.requests) - before == 1, "nothing is fetched until the pause is over"
    clock.now += 3700
    monkeypatch.setattr(memory, "BOOT", store / "another boot")
    assert Client(store, server.url, clock=clock).sync().task == 3, "the machine has restarted"


def die(store: Path, url: str) -> subprocess.CompletedProcess[bytes]:
    """A process that is killed as soon as it applies anything."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, store, url], stderr=subprocess.PIPE, check=False
    )

"""The fleet repository, with python-tuf's own client over a real HTTP server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Fleet
from fleet_kit import Clock, Made, made, served
from tuf.ngclient import Updater

from sdlora_edge.errors import InputError, NothingToDo
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.targets import BUNDLE, UPDATE, Published


@pytest.fixture
def empty(tmp_path: Path) -> Made:
    return made(tmp_path, Clock(time.time()))


@pytest.fixture
def full(empty: Made, fleet: Fleet) -> Made:
    """The bundle and all packets are published."""
    empty.repository.publish([fleet.bundle, *fleet.packets], empty.targets_keys, empty.online)
    return empty


@pytest.fixture
def url(full: Made) -> Iterator[str]:
    with served(full.path) as server:
        yield server.url


def client(full: Made, url: str, folder: Path) -> Updater:
    """A client that begins with the first root."""
    for name in ("metadata", "targets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Updater(
        str(folder / "metadata"),
        f"{url}/metadata/",
        str(folder / "targets"),
        f"{url}/targets/",
        bootstrap=full.root,
    )


def test_a_client_finds_packets_and_plans_and_loads_them(
    full: Made, fleet: Fleet, url: str, tmp_path: Path
) -> None:
    packets = [t for t in full.repository.targets() if t.published.kind == UPDATE]
    plan = Plan("line-3", (Step(packets[0].digest, packets[0].published.end, 1),))
    full.repository.set_plan(plan, full.online)
    updater = client(full, url, tmp_path / "client")
    updater.refresh()
    info = updater.get_targetinfo("rollout/line-3.json")
    assert info
    assert Plan.from_json(Path(updater.download_target(info)).read_bytes()) == plan
    for target in packets:
        info = updater.get_targetinfo(target.path)
        assert info
        assert Published.from_custom(info.custom) == target.published
        data = Path(updater.download_target(info)).read_bytes()
        assert data in [path.read_bytes() for path in fleet.packets]
    assert full.repository.channels() == ["line-3"]


def test_the_bundle_is_published_whole(full: Made, fleet: Fleet, url: str, tmp_path: Path) -> None:
    (bundle,) = [t for t in full.repository.targets() if t.published.kind == BUNDLE]
    updater = client(full, url, tmp_path / "client")
    for file in fleet.bundle.iterdir():
        info = updater.get_targetinfo(f"bundles/{bundle.digest}/{file.name}")
        assert info
        assert Path(updater.download_target(info)).read_bytes() == file.read_bytes()


def test_the_timestamp_is_small(full: Made) -> None:
    assert (full.path / "metadata" / "timestamp.json").stat().st_size < 600


def test_a_packet_needs_a_bundle_of_its_lineage(empty: Made, fleet: Fleet) -> None:
    with pytest.raises(Exception, match="publish the bundle, or name it with --bundle"):
        empty.repository.publish(fleet.packets, empty.targets_keys, empty.online)
    empty.repository.publish(fleet.packets, empty.targets_keys, empty.online, [fleet.bundle])
    assert len(empty.repository.targets()) == len(fleet.packets)
    with pytest.raises(NothingToDo):
        empty.repository.publish(fleet.packets, empty.targets_keys, empty.online)


def test_a_step_of_an_unpublished_packet_is_refused(full: Made) -> None:
    with pytest.raises(InputError, match="is not published"):
        full.repository.set_plan(Plan("x", (Step("a" * 64, "b" * 64, 1),)), full.online)


def test_refresh_renews_the_timestamp_alone(full: Made) -> None:
    assert full.repository.refresh(full.online).renewed == ("timestamp",)

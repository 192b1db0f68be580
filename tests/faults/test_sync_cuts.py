"""The power is cut at every point of a sync, in every way a disk allows; the device restarts, serves, and follows the repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import Fleet
from faults.simulator import Simulator
from faults.syncing import SYNCS, Following

from sdlora_edge.fleet.client import Client
from sdlora_edge.fleet.handled import HANDLED, Facts, Handled
from sdlora_edge.fleet.targets import Target
from sdlora_edge.fleet.trusted import View
from sdlora_edge.storage import atomic, disk

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def following(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Following:
    return Following(fleet, tmp_path_factory.mktemp("following"))


@pytest.mark.parametrize("name", SYNCS)
def test_every_cut_of_a_sync_leaves_a_device_that_follows(following: Following, name: str) -> None:
    report = following.play(following.scenarios()[name])
    assert report.problems == []
    assert report.points >= 25


def handled_first(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """What was handled is written down before the packets are applied."""
    take = Client._take

    def early(client: Client, view: View, targets: Sequence[Target], found: Any) -> Facts:
        done = Handled(view.snapshot, client._standing(), 0, int(client._clock()))
        atomic.write(client._folder / HANDLED, done.to_json(), like=client._store.path)
        return take(client, view, targets, found)

    patch.setattr(Client, "_take", early)


def names_not_synced(simulator: Simulator, patch: pytest.MonkeyPatch) -> None:
    """The names of the metadata need not survive."""
    patch.setattr(disk, "sync", lambda path: None if path.name == "fleet" else simulator.sync(path))


@pytest.mark.parametrize(
    ("sabotage", "name"), [(handled_first, "sync then apply"), (names_not_synced, "root rotation")]
)
def test_the_simulator_sees_a_sync_that_forgets(
    following: Following,
    sabotage: Callable[[Simulator, pytest.MonkeyPatch], None],
    name: str,
) -> None:
    assert following.play(following.scenarios()[name], sabotage=sabotage).problems

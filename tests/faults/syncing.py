"""A device that follows a repository in a folder while its power may fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Fleet
from faults.scenarios import STORE, Fixture, Found, Scenario, Step
from fleet_kit import Clock, made
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata

from sdlora_edge.device import Device
from sdlora_edge.errors import TrustError
from sdlora_edge.fleet import rollout
from sdlora_edge.fleet.client import Client, Synced
from sdlora_edge.fleet.identity import Changes, configure
from sdlora_edge.fleet.online import OnlineKeys
from sdlora_edge.fleet.rotation import RoleChange
from sdlora_edge.fleet.targets import UPDATE
from sdlora_edge.formats.signing import load_public, load_signer, new_key


class Followed(NamedTuple):
    """What a restarted device serves, and the versions of the root and the timestamp that it trusts."""

    serves: Found | str
    root: int
    timestamp: int


class Following(Fixture):
    """Three states of one repository: without a roll-out, with tasks 1 and 2, and with new keys."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        super().__init__(fleet, folder)
        self.clock = Clock()
        self.site = site = made(folder / "site", self.clock)
        site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
        targets = [t for t in site.repository.targets() if t.published.kind == UPDATE]
        steps = [
            rollout.Step(t.digest, t.published.end, t.published.sequence, (100,)) for t in targets
        ]
        steps.sort(key=lambda step: step.sequence)
        self.empty = self._copied("empty")
        site.repository.set_plan(rollout.Plan("line-3", tuple(steps[:2])), site.online)
        self.full = self._copied("full")
        self._rotate(folder / "site" / "keys" / "online")
        self.rotated = self._copied("rotated")

    def _copied(self, name: str) -> Path:
        shutil.copytree(self.site.path, self.folder / name)
        return self.folder / name

    def _rotate(self, folder: Path) -> None:
        old = load_signer(folder / "timestamp.key").public_key.keyid
        public = load_public(new_key("timestamp-new", folder)[1])
        change = RoleChange(add=[public], remove=[old])
        online = OnlineKeys.load(folder)
        self.site.repository.rotate("timestamp", change, self.site.keys["root"], online)

    def client(self, store: Path, repository: Path) -> Client:
        return Client(store, f"file://{repository}", clock=self.clock)

    def observe(self, store: Path) -> Any:
        found = super().observe(store)
        return Followed(found, _version(store, "root"), _version(store, "timestamp"))

    def restart(self, root: Path) -> Any:
        """It serves; an older repository is refused if a newer one was trusted; it follows the newest."""
        store = root / STORE
        found = self.observe(store)
        for older, newer in ((self.empty, self.full), (self.full, self.rotated)):
            if found[1:] == (_version(newer, "root"), _version(newer, "timestamp")):
                with pytest.raises(TrustError):
                    self.client(store, older).sync()
        done = self.client(store, self.rotated).sync()
        assert done.task == 2
        assert not self.client(store, self.rotated).sync().news
        device = Device.open(store, threads=1)
        assert self.digest(device) == self.logits[2]
        assert device.status().damage == ()
        left = [p.name for p in (store / "fleet").rglob("*") if p.name.startswith(".tmp-")]
        assert left == []  # what an update has left beside it, the next update removes
        assert not list((store / "fleet").glob("incoming/*"))
        return found

    def sync(self, repository: Path) -> Callable[[Path], Synced]:
        return lambda store: self.client(store, repository).sync()

    def member(self, store: Path) -> None:
        Device.init(self.fleet.bundle, store)
        configure(store, Changes(name="cam", channel="line-3"))
        self.client(store, self.empty).trust(self.site.root)

    def looked(self, repository: Path) -> Step:
        """It has fetched and trusted all metadata, and not acted on it."""

        def step(store: Path) -> None:
            with self.client(store, repository)._metadata.refresh(self.clock()):
                pass

        return step

    def rooted(self, repository: Path) -> Step:
        """It has the newest root, and nothing after it."""

        def step(store: Path) -> None:
            newest = max((repository / "metadata").glob("*.root.json"))
            shutil.copy(newest, store / "fleet" / "root.json")

        return step

    def scenarios(self) -> dict[str, Scenario]:
        first, take, rotation = map(self.sync, (self.empty, self.full, self.rotated))
        return {
            "sync": Scenario(
                (self.member,), (first,), (), (self.rooted(self.empty), self.looked(self.empty))
            ),
            "sync then apply": Scenario(
                (self.member, first), (take,), (), (self.looked(self.full),)
            ),
            "root rotation": Scenario(
                (self.member, take),
                (rotation,),
                (),
                (self.rooted(self.rotated), self.looked(self.rotated)),
            ),
        }


SYNCS = "sync", "sync then apply", "root rotation"


def _version(folder: Path, role: str) -> int:
    """Of a role in a store, or in a repository; 0 if there is none."""
    found = [folder / "fleet" / f"{role}.json", folder / "metadata" / f"{role}.json"]
    found += sorted(folder.glob(f"metadata/*.{role}.json"))[-1:]
    for path in found:
        if path.is_file():
            try:
                return int(Metadata[Any].from_bytes(path.read_bytes()).signed.version)
            except RepositoryError:
                return 0
    return 0

"""A device that is attacked, and the proof that it did not notice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attacks_kit import Cli, Victim
from conftest import Fleet, make_images

from sdlora_edge.device import Device
from sdlora_edge.formats import signing


@pytest.fixture(scope="session")
def flashed(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flashed")
    Device.init(fleet.bundle, folder / "store").apply(fleet.packets[0])
    make_images(folder / "images", ["a", "b"], 1)
    return folder


@pytest.fixture
def victim(cli: Cli, fleet: Fleet, flashed: Path, tmp_path: Path) -> Iterator[Victim]:
    """Whatever was done to it, it takes the next good packet afterwards."""
    shutil.copytree(flashed / "store", tmp_path / "store")
    (tmp_path / "outside").mkdir()
    images = sorted((flashed / "images").rglob("*.png"))
    found = Victim(
        cli,
        tmp_path / "store",
        images,
        fleet.packets[1],
        tmp_path / "outside",
        signing.load_signer(fleet.key),
    )
    yield found
    task = found.stand()[0]["task"]
    if task < 2:
        later = found.cli("device", "apply", *fleet.packets[task:2], "--store", found.store)
        assert later.code == 0, later
    assert found.stand()[0]["task"] >= 2


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A key that no device knows."""
    return signing.load_signer(signing.new_key("stranger", tmp_path_factory.mktemp("stranger"))[0])

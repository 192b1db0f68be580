"""The Mender Update Module, driven by Debian's real mender-client in standalone mode."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import debian
import pytest
from conftest import Fleet

from sdlora_edge.device import Device

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "examples" / "mender" / "sdlora-packet"
GUIDE = ROOT / "docs" / "guides" / "mender.md"
PLACES = {"modules": "/usr/share/mender/modules/v3", "lib": "/var/lib", "etc": "/etc/mender"}
"""In a private mount namespace a folder of the test takes the place of these: /var/lib/mender is a
link to a folder that Debian does not make."""


@dataclass(frozen=True)
class Client:
    """A device with Mender and a store."""

    folder: Path
    store: Path

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        binds = "".join(f'mount --bind "$0/{k}" {v} && ' for k, v in PLACES.items())
        mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = [
            "unshare",
            "--mount",
            *mapped,
            "sh",
            "-c",
            f'{binds}exec mender --no-syslog "$@"',
        ]
        environment = os.environ | {
            "SDLORA_EDGE_STORE": str(self.store),
            "SDLORA_EDGE_PROGRAM": str(Path(sys.executable).with_name("sdlora-edge")),
        }
        words = [*command, str(self.folder), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)

    def install(self, *packets: Path) -> subprocess.CompletedProcess[str]:
        return self.run("install", artifact(self.folder / "artifact.mender", *packets))

    @property
    def name(self) -> str:
        """The Artifact that Mender says is in force."""
        return self.run("show-artifact").stdout.strip()

    @property
    def state(self) -> str:
        return Device.open(self.store).status().state


def documented() -> list[str]:
    """The guide's command that makes an Artifact."""
    found = re.search(r"(mender-artifact write .*?)\n```", GUIDE.read_text(), re.S)
    assert found
    return found[1].replace("\\\n", "").split()


def artifact(path: Path, *packets: Path) -> Path:
    words = documented()
    words[0] = debian.program("mender-artifact")
    words[words.index("--output-path") + 1] = str(path)
    place = words.index("--file")
    words[place : place + 2] = [word for p in packets for word in ("--file", str(p))]
    subprocess.run(words, check=True, capture_output=True)
    return path


def prepared(folder: Path, store: Path) -> Client:
    debian.program("mender")
    debian.program("mender-artifact")
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    tried = ["unshare", "--mount", *mapped, "true"]
    if subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("no private mount namespace can be made here")
    for path in (ROOT, folder, Path(sys.executable)):
        if path.is_relative_to("/var/lib"):
            pytest.skip(f"{path} would be hidden: /var/lib is replaced for Mender")
    for name, place in PLACES.items():
        assert Path(place).is_dir(), f"{place} of mender-client is missing"
        (folder / name).mkdir()
    (folder / "lib" / "mender").mkdir()
    shutil.copy(MODULE, folder / "modules")
    (folder / "lib" / "mender" / "device_type").write_text("device_type=camera\n")
    (folder / "etc" / "artifact_info").write_text("artifact_name=factory\n")
    return Client(folder, store)


@pytest.fixture
def client(store: Path, tmp_path: Path) -> Client:
    (tmp_path / "mender").mkdir()
    return prepared(tmp_path / "mender", store)


def seen(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in [folder, *folder.rglob("*")]}


@pytest.mark.debian
def test_a_good_packet_is_in_force_after_the_commit(client: Client, fleet: Fleet) -> None:
    places = [Path(place) for place in PLACES.values() if place != "/var/lib"]
    before = [seen(place) for place in places]
    done = client.install(fleet.packets[0])
    assert done.returncode == 0, done.stderr
    committed = client.run("commit")
    assert committed.returncode == 0, committed.stderr
    assert Device.open(client.store).status().packets == 1
    assert client.name == "cups-3"
    assert [seen(place) for place in places] == before, "the machine is not as it was"
    assert not any(Path("/var/lib/mender").glob("*"))


@pytest.mark.debian
def test_a_rollback_takes_back_only_what_the_artifact_applied(client: Client, fleet: Fleet) -> None:
    Device.open(client.store).apply(fleet.packets[0])
    before = client.state
    assert client.install(*fleet.packets).returncode == 0  # the first one is held already
    assert client.state != before
    done = client.run("rollback")
    assert done.returncode == 0, done.stderr
    assert client.state == before
    assert client.name == "factory"


@pytest.mark.debian
def test_a_forged_packet_fails_and_what_came_before_it_is_taken_back(
    client: Client, fleet: Fleet, tmp_path: Path
) -> None:
    before = client.state
    data = bytearray(fleet.packets[1].read_bytes())
    data[-1] ^= 1
    forged = tmp_path / f"{fleet.packets[1].stem}-forged.sdlora"
    forged.write_bytes(data)
    done = client.install(fleet.packets[0], forged)
    assert done.returncode != 0
    assert "forged" in done.stderr
    assert client.state == before
    assert client.name == "factory"
    assert client.run("commit").returncode == 2, "nothing waits for a commit"


@pytest.mark.debian
def test_a_packet_that_is_held_already_is_a_success(client: Client, fleet: Fleet) -> None:
    Device.open(client.store).apply(fleet.packets[0])
    before = client.state
    assert client.install(fleet.packets[0]).returncode == 0
    assert client.run("commit").returncode == 0
    assert client.state == before


@pytest.fixture
def work(tmp_path: Path, fleet: Fleet) -> Path:
    """The folder that Mender gives to a module."""
    for name in ("files", "tmp"):
        (tmp_path / "work" / name).mkdir(parents=True)
    shutil.copy(fleet.packets[0], tmp_path / "work" / "files")
    return tmp_path / "work"


def module(store: Path, state: str, work: Path) -> subprocess.CompletedProcess[str]:
    """One call by hand: what Mender cannot be made to do."""
    environment = os.environ | {
        "SDLORA_EDGE_STORE": str(store),
        "SDLORA_EDGE_PROGRAM": str(Path(sys.executable).with_name("sdlora-edge")),
    }
    words = [sys.executable, "-B", str(MODULE), state, str(work)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def test_it_answers_what_mender_asks(store: Path, work: Path) -> None:
    said = {
        state: module(store, state, work) for state in ("NeedsArtifactReboot", "SupportsRollback")
    }
    assert [done.stdout for done in said.values()] == ["No\n", "Yes\n"]
    for state in ("Download", "Cleanup", "ArtifactRollback", "a state of a later protocol"):
        done = module(store, state, work)
        assert (done.returncode, done.stdout) == (0, ""), state
    assert Device.open(store).status().packets == 0


def test_after_another_change_a_rollback_takes_nothing_back(
    store: Path, work: Path, fleet: Fleet
) -> None:
    assert module(store, "ArtifactInstall", work).returncode == 0
    Device.open(store).apply(fleet.packets[1])
    state = Device.open(store).status().state
    done = module(store, "ArtifactRollback", work)
    assert done.returncode != 0
    assert "nothing is rolled back" in done.stderr
    assert Device.open(store).status().state == state


def test_an_interrupted_install_is_rolled_back(store: Path, work: Path, fleet: Fleet) -> None:
    """A power cut came after the first of two packets: later, the store has lost its copy of it."""
    before = Device.open(store).status().state
    shutil.copy(fleet.packets[1], work / "files")
    assert module(store, "ArtifactInstall", work).returncode == 0
    Device.open(store).rollback()
    assert module(store, "ArtifactCommit", work).returncode == 0
    held = store / "packets" / hashlib.sha256(fleet.packets[0].read_bytes()).hexdigest()
    held.chmod(0o600)
    held.write_bytes(held.read_bytes()[:-1])
    refused = module(store, "ArtifactCommit", work)
    assert refused.returncode != 0
    assert held.name in refused.stderr
    assert module(store, "ArtifactRollback", work).returncode == 0
    assert Device.open(store).status().state == before


def test_an_artifact_without_packets_says_so(store: Path, work: Path) -> None:
    for path in (work / "files").iterdir():
        path.unlink()
    done = module(store, "ArtifactInstall", work)
    assert done.returncode != 0
    assert "holds no packet" in done.stderr


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder that another user may enter: pytest's own is for the user who runs the tests."""
    with tempfile.TemporaryDirectory(prefix="sdlora-mender-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a program as another user")
def test_everything_runs_as_the_owner_of_the_store(
    elsewhere: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mender is root: files of root in a store would lock out the program that predicts."""
    import pwd

    nobody = pwd.getpwnam("nobody")
    program = elsewhere / "program"
    program.write_text(
        '#!/bin/sh\nid -u >>"$0.users"\n'
        'for name; do [ ! -e "$name" ] || [ -d "$name" ] || cat "$name" >/dev/null || exit 3; done\n'
        """echo '{"state": "s", "to": "t", "damage": []}'\n"""
    )
    program.chmod(0o755)
    (elsewhere / "store").mkdir()
    for path in (elsewhere, elsewhere / "store"):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    work.chmod(0o700)
    environment = {"SDLORA_EDGE_STORE": str(elsewhere / "store")}
    environment["SDLORA_EDGE_PROGRAM"] = str(program)
    words = [sys.executable, "-B", str(MODULE), "ArtifactInstall", str(work)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    users = (elsewhere / "program.users").read_text().split()
    assert users == [str(nobody.pw_uid)] * 3  # inspect, status, apply

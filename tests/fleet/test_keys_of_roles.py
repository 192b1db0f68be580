"""Keys of the fleet repository's roles: rotation, thresholds, expiry, and a crash at any write."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Fleet
from fleet_kit import Clock, Made, client, made, served
from tuf.api.exceptions import ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata

from sdlora_edge.errors import NothingToDo, TrustError, UsageError
from sdlora_edge.fleet.online import OnlineKeys
from sdlora_edge.fleet.repository import Repository
from sdlora_edge.fleet.roles import OFFLINE, ROLES
from sdlora_edge.fleet.rotation import RoleChange
from sdlora_edge.formats.signing import load_public, new_key
from sdlora_edge.storage import disk

pytestmark = pytest.mark.long


@pytest.fixture
def empty(tmp_path: Path) -> Made:
    return made(tmp_path, Clock(time.time()))


def replacement(at: Made, role: str) -> tuple[RoleChange, Path]:
    """A new key for a role, in the place of its only one."""
    folder = at.keys[role][0].parent
    private, public = new_key(f"{role}-new", folder)
    old = load_public(at.keys[role][0].with_suffix(".pub")).keyid
    return RoleChange([load_public(public)], (old,)), private


def online(at: Made) -> OnlineKeys:
    return OnlineKeys.load(at.online.folder)


@pytest.mark.parametrize("role", ROLES)
def test_a_client_follows_new_keys_and_the_old_ones_can_be_destroyed(
    empty: Made, fleet: Fleet, tmp_path: Path, role: str
) -> None:
    packet, *others = fleet.packets
    empty.repository.publish([fleet.bundle, packet], empty.targets_keys, empty.online)
    with served(empty.path) as server:
        client(empty, server.url, tmp_path / "client").refresh()
        before = empty.repository.roles.timestamp()
        change, private = replacement(empty, role)
        signers = [*empty.keys["root"], *empty.keys["targets"]]
        signers += [private] if role in OFFLINE else []
        found = empty.repository.rotate(role, change, signers, online(empty))
        assert found.visible
        after = empty.repository.roles.timestamp()
        assert before
        assert after
        old, new = (t.signed.snapshot_meta.version for t in (before, after))
        assert new > old, "a device that looks at the timestamp alone learns of it"
        assert len(after.metadata.signatures) == 1, "the old key does not sign any more"
        client(empty, server.url, tmp_path / "client").refresh()

        for file in empty.keys[role]:
            file.unlink()
        targets = [private] if role == "targets" else empty.targets_keys
        empty.repository.publish(others, targets, online(empty))
        follower = client(empty, server.url, tmp_path / "client")
        newcomer = client(empty, server.url, tmp_path / "newcomer")
        for one in (follower, newcomer):
            for target in empty.repository.targets():
                assert one.get_targetinfo(target.path)


@contextmanager
def cut_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk takes so many files, and then no more."""
    rename, left = disk.rename, [writes]

    def cut(source: Path, target: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", cut)
        yield


@pytest.mark.parametrize("role", ROLES)
def test_a_crash_in_a_rotation_locks_out_no_client(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    for writes in range(20):
        at = made(tmp_path / str(writes), Clock(time.time()))
        change, private = replacement(at, role)
        signers = [*at.keys["root"], *at.keys["targets"], *([private] if role in OFFLINE else [])]
        owner = "targets" if role == "rollout" else "root"
        try:
            with cut_after(writes, monkeypatch):
                at.repository.rotate(role, change, signers, online(at))
                complete = True
        except KeyboardInterrupt:
            complete = False
        with served(at.path) as server:
            client(at, server.url, at.path / "client").refresh()
            if complete:
                assert writes > 3
                return
            if at.repository.roles.staged(owner):
                at.repository.sign(owner, signers, online(at))
            at.repository.refresh(online(at))
            client(at, server.url, at.path / "client").refresh()
    raise AssertionError("it never ends")


def test_a_crash_in_publish_is_completed_by_the_next_call(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for writes in range(30):
        at = made(tmp_path / str(writes), Clock(time.time()))
        files = [fleet.bundle, *fleet.packets]
        with served(at.path) as server:
            try:
                with cut_after(writes, monkeypatch):
                    at.repository.publish(files, at.targets_keys, at.online)
                    complete = True
            except KeyboardInterrupt:
                complete = False
            client(at, server.url, at.path / "client").refresh()
            if complete:
                return
            with suppress(NothingToDo):  # only a leftover was to be removed
                at.repository.publish(files, at.targets_keys, at.online)
            assert len(at.repository.targets()) == 1 + len(fleet.packets)
            found = client(at, server.url, at.path / "client")
            for target in at.repository.targets():
                info = found.get_targetinfo(target.path)
                assert info
                found.download_target(info)
    raise AssertionError("it never ends")


def test_a_root_by_too_few_keys_is_staged_and_refused_by_clients(tmp_path: Path) -> None:
    at = made(tmp_path, Clock(time.time()), {"root": 2})
    first, second = at.keys["root"]
    change = RoleChange(days=100)
    found = at.repository.rotate("root", change, [first], at.online)
    assert (found.signatures, found.threshold, found.staged) == (1, 2, True)
    assert not (at.path / "metadata" / "2.root.json").exists()
    staged = at.path / "staged" / "root.json"
    with served(at.path) as server:
        forced = at.path / "metadata" / "2.root.json"
        forced.write_bytes(staged.read_bytes())
        with pytest.raises(RepositoryError):
            client(at, server.url, tmp_path / "client").refresh()
        with pytest.raises(TrustError, match="not signed by enough keys"):
            Repository.open(at.path)
        forced.unlink()
        with pytest.raises(NothingToDo, match="has signed it already"):
            at.repository.sign("root", [first], at.online)
        assert at.repository.sign("root", [second], at.online).visible
        client(at, server.url, tmp_path / "client").refresh()


def test_two_people_publish(fleet: Fleet, tmp_path: Path) -> None:
    at = made(tmp_path, Clock(time.time()), {"targets": 2})
    first, second = at.targets_keys
    found = at.repository.publish([fleet.bundle, *fleet.packets], [first], at.online)
    assert (found.signatures, found.threshold, found.staged) == (1, 2, True)
    assert at.repository.targets() == []
    at.repository.refresh(at.online)
    with pytest.raises(NothingToDo, match="wait for more signatures"):
        at.repository.publish([fleet.bundle], [first], at.online)
    assert at.repository.sign("targets", [second], at.online).visible
    assert len(at.repository.targets()) == 1 + len(fleet.packets)
    with pytest.raises(NothingToDo, match="waits for a signature"):
        at.repository.sign("targets", [second], at.online)


def test_a_stranger_signs_nothing(empty: Made, fleet: Fleet, tmp_path: Path) -> None:
    stranger, _ = new_key("stranger", tmp_path / "other")
    with pytest.raises(TrustError, match="none of these keys is one of the role targets"):
        empty.repository.publish([fleet.bundle], [stranger], empty.online)
    with pytest.raises(TrustError, match="none of these keys is one of the role root"):
        empty.repository.rotate("root", RoleChange(days=9), [stranger], empty.online)


def test_a_threshold_must_be_met(empty: Made) -> None:
    with pytest.raises(UsageError, match=r"a threshold of 2 with 1 key\(s\)"):
        empty.repository.rotate("root", RoleChange(threshold=2), empty.keys["root"], empty.online)


def test_metadata_that_somebody_else_put_there_is_not_signed(empty: Made) -> None:
    """Whoever can write to the folder must not get a signature for what they wrote."""
    path = empty.path / "metadata" / "1.targets.json"
    metadata = Metadata.from_bytes(path.read_bytes())
    metadata.signed.version = 2
    (path.parent / "2.targets.json").write_bytes(metadata.to_bytes())
    assert empty.repository.roles.targets().signed.version == 1
    path.write_bytes(metadata.to_bytes())
    with pytest.raises(TrustError, match="restore the repository's folder"):
        Repository.open(empty.path)


def test_another_repository_in_its_place_is_refused(empty: Made, tmp_path: Path) -> None:
    other = made(tmp_path / "other", Clock(time.time()))
    Repository.open(empty.path, pinned=empty.root)
    with pytest.raises(TrustError, match="not the root that this repository began with"):
        Repository.open(other.path, pinned=empty.root)


def test_an_expired_timestamp_is_refused_and_refresh_renews_what_expires_soon(
    empty: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = empty.repository.roles.clock
    assert isinstance(clock, Clock)
    now, day = clock.now, 86_400
    with served(empty.path) as server:
        clock.now = now - 20 * day  # the repository was last refreshed then
        empty = made(tmp_path / "old", clock)
    with served(empty.path) as server:
        with pytest.raises(ExpiredMetadataError):
            client(empty, server.url, tmp_path / "client").refresh()
        clock.now = now
        assert empty.repository.refresh(empty.online).renewed == ("snapshot", "timestamp")
        client(empty, server.url, tmp_path / "client").refresh()
    clock.now = now + 330 * day
    caplog.clear()
    found = empty.repository.refresh(empty.online, {"timestamp": 21})
    assert found.renewed == ("rollout", "snapshot", "timestamp")
    assert found.expires["timestamp"] == 20
    assert "root expires in 14 days: renew it with sdlora-edge fleet renew root" in caplog.text
    for role in OFFLINE:
        empty.repository.rotate(role, RoleChange(), empty.keys[role], empty.online)
        assert empty.repository.refresh(empty.online).expires[role] == 364
    assert empty.repository.refresh(empty.online).expires["timestamp"] == 20, "it lasts"


def test_a_clock_that_went_back_signs_no_timestamp(empty: Made) -> None:
    clock = empty.repository.roles.clock
    assert isinstance(clock, Clock)
    clock.now -= 86_400
    with pytest.raises(UsageError, match="set the clock"):
        empty.repository.refresh(empty.online)

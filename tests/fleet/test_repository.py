"""The fleet repository, with python-tuf's own client over a real HTTP server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Fleet, Result
from fleet_kit import Clock, Made, client, made, served
from sdlora_edge.export.issuing import KeyChange, revoke, rotate_keys, squash_packets

from sdlora_edge.errors import InputError, NotForThisDevice, NothingToDo, ResourceError, TrustError
from sdlora_edge.fleet import overview
from sdlora_edge.fleet.pruning import PruneOptions
from sdlora_edge.fleet.repository import Repository
from sdlora_edge.fleet.roles import Metadata, TargetFile
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.settling import settled
from sdlora_edge.fleet.targets import BUNDLE, REVOCATION, TRUST, UPDATE, Published
from sdlora_edge.formats import signing
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.storage import disk


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
    with pytest.raises(NotForThisDevice, match="publish the bundle, or name it with --bundle"):
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


def test_what_is_served_can_be_read_whatever_the_umask(fleet: Fleet, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        at = made(tmp_path, Clock(time.time()))
        at.repository.publish([fleet.bundle, *fleet.packets], at.targets_keys, at.online)
    finally:
        os.umask(before)
    for folder in (at.path / "metadata", at.path / "targets"):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_packet_that_no_trusted_key_has_signed_is_refused(
    full: Made, fleet: Fleet, tmp_path: Path
) -> None:
    stranger, public = signing.new_key("stranger", tmp_path / "other")
    packets = sorted(fleet.packets)[:2]
    own = [str(fleet.key.with_suffix(".pub"))]
    squash_packets(packets, stranger, tmp_path / "bad.sdlora", own)
    with pytest.raises(TrustError, match=r"bad\.sdlora: signature refused"):
        full.repository.publish([tmp_path / "bad.sdlora"], full.targets_keys, full.online)
    assert public.is_file()


def test_control_packets_are_published_and_old_keys_then_sign_nothing_new(
    full: Made, fleet: Fleet, tmp_path: Path
) -> None:
    new, public = signing.new_key("new", tmp_path / "new")
    change = KeyChange(add=[public], remove=[fleet.key.with_suffix(".pub")])
    trust, by_old, by_new = (tmp_path / f"{name}.sdlora" for name in ("trust", "old", "new"))
    rotate_keys(fleet.bundle, [fleet.key, new], trust, change)
    revoke(fleet.bundle, 3, 0, fleet.key, by_old)
    revoke(fleet.bundle, 3, 0, new, by_new, [trust])
    with pytest.raises(TrustError):
        full.repository.publish([by_new], full.targets_keys, full.online)
    full.repository.publish([trust, by_new], full.targets_keys, full.online)
    kinds = {t.published.kind: t.published for t in full.repository.targets()}
    assert (kinds[TRUST].sequence, kinds[TRUST].lineage) == (2, "")
    assert (kinds[REVOCATION].sequence, kinds[REVOCATION].revision) == (3, 0)
    with pytest.raises(TrustError):
        full.repository.publish([by_old], full.targets_keys, full.online)
    with pytest.raises(NothingToDo, match="published already"):
        full.repository.publish([trust, *fleet.packets], full.targets_keys, full.online)


def test_another_file_is_refused(empty: Made, fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds neither manifest\.json nor packets"):
        empty.repository.publish([tmp_path / "none"], empty.targets_keys, empty.online)
    with pytest.raises(InputError, match="missing"):
        empty.repository.publish([tmp_path / "missing"], empty.targets_keys, empty.online)
    bundle = tmp_path / "bundle"
    shutil.copytree(fleet.bundle, bundle)
    (bundle / "model.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match="not the file the manifest names"):
        empty.repository.publish([bundle], empty.targets_keys, empty.online)


def test_without_online_keys_devices_see_it_after_refresh(empty: Made, fleet: Fleet) -> None:
    found = empty.repository.publish([fleet.bundle], empty.targets_keys)
    assert (found.staged, found.visible) == (False, False)
    assert not settled(empty.repository.roles)
    assert empty.repository.refresh(empty.online).renewed == ("snapshot", "timestamp")
    assert settled(empty.repository.roles)


def test_two_publishers_wait_for_each_other(full: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk.lock(full.path / "fleet.lock"):
        lock = disk.lock
        monkeypatch.setattr(disk, "lock", lambda path, wait: lock(path, 0.0))
        with pytest.raises(ResourceError, match="try again when it has ended"):
            full.repository.refresh(full.online)


def test_a_client_with_an_old_snapshot_still_finds_all_its_files(
    full: Made, fleet: Fleet, tmp_path: Path
) -> None:
    """Consistent snapshots: what was served once stays until it is pruned."""
    with served(full.path) as server:
        old = client(full, server.url, tmp_path / "client")
        old.refresh()
        first = next(t for t in full.repository.targets() if t.published.kind == UPDATE)
        step = Step(first.digest, first.published.end, 1)
        full.repository.set_plan(Plan("a", (step,)), full.online)
        info = old.get_targetinfo(first.path)
        assert info
        old.download_target(info)
        assert old.get_targetinfo("rollout/a.json") is None


def test_targets_metadata_grows_by_half_a_kilobyte_for_each_packet(empty: Made) -> None:
    roles, sizes = empty.repository.roles, []
    for count in (10, 100):
        targets = roles.targets().signed
        for i in range(count):
            digest = f"{i:064x}"
            says = Published(UPDATE, "a" * 64, digest, f"{i + 1:064x}", i + 1, 0, f"week {i}")
            custom = {"custom": says.to_dict()}
            path = says.path(digest)
            targets.targets[path] = TargetFile(1, {"sha256": digest}, path, custom)
        sizes.append(len(Metadata(targets).to_bytes()))
    assert (sizes[1] - sizes[0]) / 90 < 520


def test_prune_leaves_what_devices_need(full: Made, fleet: Fleet, tmp_path: Path) -> None:
    clock, repository = full.repository.roles.clock, full.repository
    assert isinstance(clock, Clock)
    squash = tmp_path / "squash.sdlora"
    squash_packets(fleet.packets, fleet.key, squash, [fleet.key.with_suffix(".pub")])
    repository.publish([squash], full.targets_keys, full.online)
    for target in [t for t in repository.targets() if t.size != squash.stat().st_size][2:]:
        step = Step(target.digest, target.published.end, target.published.sequence, wave=3)
        repository.pace("a", lambda plan, s=step: plan.with_step(s), full.online)
    dry = repository.prune(full.targets_keys, full.online, PruneOptions(dry_run=True))
    assert repository.prune(full.targets_keys, full.online) == dry
    assert [step.sequence for step in repository.plan("a").steps] == [3]
    paths = [t.path for t in repository.targets()]
    assert dry.steps == 1
    assert dry.files == 0, "files stay while a client may still ask for them"
    assert [path[15:19] for path in dry.packets] == ["0001", "0002"]
    assert dry.stranded == (1,)
    assert not set(dry.packets) & set(paths)
    with pytest.raises(NothingToDo, match="nothing to remove"):
        repository.prune(full.targets_keys, full.online)

    before = {path for path in full.path.rglob("*") if path.is_file()}
    clock.now += 31 * 86_400
    repository.refresh(full.online)
    found = repository.prune((), full.online)
    after = {path for path in full.path.rglob("*") if path.is_file()}
    assert found.files >= len(before - after) > 5
    assert any(dry.packets[0].rpartition("/")[2] in path.name for path in before - after)
    assert (full.path / "metadata" / "1.root.json").exists()
    Repository.open(full.path)
    with served(full.path) as server:
        newcomer = client(full, server.url, tmp_path / "client")
        for path in paths:
            info = newcomer.get_targetinfo(path)
            assert info
            newcomer.download_target(info)


def test_the_command_line_publishes_and_rolls_out(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_ = json.loads(cli("fleet", "init", "--json", "--expires", "timestamp=21").out)
    assert made_["root"] == sha256((tmp_path / "fleet-keys" / "root.json").read_bytes())
    assert cli("fleet", "init").code == 2
    assert cli("fleet", "publish", *fleet.packets).code == 5
    assert cli("fleet", "publish", fleet.bundle, fleet.packets[0].parent).code == 0
    assert cli("fleet", "publish", fleet.bundle).code == 7
    started = cli(
        *("fleet", "rollout", "start", 2, "--channel", "line-3", "--waves", "5,100"),
        *("--groups", "canary,lab", "--not-before", "2026-01-01T00:00Z", "--json"),
    )
    (step,) = json.loads(started.out)["steps"]
    assert (step["waves"], step["groups"], step["sequence"]) == ([5, 100], ["canary", "lab"], 2)
    at = ("--channel", "line-3")
    assert cli("fleet", "rollout", "pause", fleet.packets[1], *at, "--reason", "odd").code == 0
    assert "odd" in cli("fleet", "rollout", "status").out
    assert cli("fleet", "rollout", "advance", 2, *at).code == 2
    assert cli("fleet", "rollout", "resume", step["packet"][:10], *at).code == 0
    assert "5 [100]" in cli("fleet", "rollout", "advance", 2, *at).out
    assert cli("fleet", "rollout", "abort", 2, *at).code == 0
    assert cli("fleet", "rollout", "pause", 3, *at).code == 2
    assert cli("fleet", "rollout", "status", "--channel", "other").code == 2
    assert "signed timestamp" in cli("fleet", "refresh").out
    for role in ("root", "targets", "rollout", "snapshot", "timestamp"):
        assert f"{role}.key" in cli("fleet", "rotate", role).out
    assert cli("fleet", "renew", "root", "--days", 100).code == 0
    assert cli("fleet", "rotate", "root", "--remove", "abcd").code == 3
    assert cli("fleet", "sign").code == 7
    assert cli("fleet", "prune").code == 7
    found = json.loads(cli("fleet", "status", "--json").out)
    assert found["roles"]["root"]["days"] == 99
    assert found["roles"]["timestamp"]["days"] == 20
    assert found["settled"]
    assert [one["sequence"] for one in found["targets"]] == [0, 1, 2, 3]
    assert found["channels"]["line-3"]["steps"][0]["status"] == "aborted"
    assert "task 3" in cli("fleet", "status").out


def test_encrypted_keys_of_two_people_on_the_command_line(
    fleet: Fleet, tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(signing.PASSPHRASE, "correct horse battery")
    more = ("--threshold", 2, "--root-keys", 3, "--targets-keys", 2, "--passphrase")
    assert cli("fleet", "init", *more).code == 0
    keys = tmp_path / "fleet-keys" / "offline"
    assert b"ENCRYPTED" in (keys / "targets-1.key").read_bytes()
    done = cli("fleet", "publish", fleet.bundle, "--key", keys / "targets-1.key")
    assert "signed by 1 of the 2 keys needed" in done.out
    assert "yes" in cli("fleet", "status").out
    assert cli("fleet", "sign", "--key", keys / "targets-2.key").code == 0
    assert "onnx fp32" in cli("fleet", "status").out
    assert cli("fleet", "init", "--repository", "other", "--keys", "k", "--threshold", 2).code == 2
    assert not (tmp_path / "k").exists()


def test_the_status_of_a_repository_counts_all_files_of_a_bundle(full: Made, fleet: Fleet) -> None:
    found = overview.status(full.repository).targets
    (bundle,) = [one for one in found if one.kind == BUNDLE]
    assert bundle.bytes == sum(file.stat().st_size for file in fleet.bundle.iterdir())

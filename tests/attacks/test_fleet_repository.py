"""The attacks that The Update Framework lists, on a device that follows a repository over HTTP.

Whatever a server or a thief does: the device serves what it served, and follows the real repository
again afterwards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import Fleet, within
from faulty_server import Faulty, Handler, endless, faulty_server, only
from fleet_kit import Clock, Made, made
from fleet_thief import LATER, Thief, replace_version, with_steps
from sdlora_edge.export.issuing import revoke
from tuf.api.metadata import Key, Metadata, MetaFile, Root, TargetFile

from sdlora_edge.device.device import Device
from sdlora_edge.errors import LinkError, SdloraError, TrustError
from sdlora_edge.fleet import fetching
from sdlora_edge.fleet.client import Client, Synced
from sdlora_edge.fleet.fetching import Fetcher
from sdlora_edge.fleet.identity import Changes, configure
from sdlora_edge.fleet.online import OnlineKeys
from sdlora_edge.fleet.rollout import Plan, Step
from sdlora_edge.fleet.rotation import RoleChange
from sdlora_edge.fleet.sync_state import last_sync
from sdlora_edge.fleet.targets import REVOCATION, UPDATE
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.signing import load_public, load_signer, new_key

pytestmark = pytest.mark.long

DAY = 86_400
CHANNEL = "line-3"
ONLINE = "rollout", "snapshot", "timestamp"


@dataclass
class Field:
    """A device at task 1 of three, its repository, and the server between them."""

    site: Made
    server: Faulty
    store: Path
    clock: Clock
    folder: Path

    def client(self) -> Client:
        fetcher = Fetcher(sleep=lambda seconds: None)
        return Client(self.store, self.server.url, clock=self.clock, fetcher=fetcher)

    def sync(self) -> Synced:
        return self.client().sync()

    def steps(self, *tasks: int, percent: int = 100) -> tuple[Step, ...]:
        found = {t.published.sequence: t for t in self.site.repository.targets() if is_update(t)}
        return tuple(Step(found[n].digest, found[n].published.end, n, (percent,)) for n in tasks)

    def plan(self, *tasks: int, percent: int = 100) -> Plan:
        return Plan(CHANNEL, self.steps(*tasks, percent=percent))

    def roll_out(self, *tasks: int) -> None:
        self.site.repository.set_plan(self.plan(*tasks), self.site.online)

    def stands(self) -> tuple[int, str]:
        status = Device.open(self.store, threads=1).status()
        assert status.damage == ()
        return status.task, status.state

    def thief(self, *roles: str) -> Thief:
        """A thief with these keys, whose repository is served from now on."""
        thief = Thief.of(self.site, self.folder / "thief", *roles)
        self.server.folder = thief.folder
        return thief

    def refuses(self, error: type[SdloraError], word: str, stolen: bool = False) -> None:
        """The device says why, takes nothing, and follows the real repository afterwards.

        stolen: whether keys were, and must be replaced for that.
        """
        before = self.stands()
        with pytest.raises(error, match=word):
            within(20, self.sync)
        assert self.stands() == before
        state = last_sync(self.store)
        assert state is not None
        assert state.errors[-1].code == error.exit_code
        self.recovers(stolen)

    def recovers(self, stolen: bool = False) -> None:
        """The real repository is back, with a packet more."""
        self.server.folder, self.server.fault = self.site.path, None
        if stolen:
            self.replace_keys()
        self.clock.now += 1
        task = self.stands()[0]
        self.roll_out(*range(1, task + 2))
        assert self.sync().task == task + 1

    def replace_keys(self) -> None:
        """New keys for snapshot and timestamp: what a thief has is worth nothing from then on."""
        folder = self.folder / "keys" / "online"
        for role in ("snapshot", "timestamp"):
            old = load_signer(folder / f"{role}.key").public_key.keyid
            public = load_public(new_key(f"{role}-new", folder)[1])
            online = OnlineKeys.load(folder)
            change = RoleChange(add=[public], remove=[old])
            self.site.repository.rotate(role, change, self.site.keys["root"], online)
        self.site = replace(self.site, online=OnlineKeys.load(folder))


def is_update(target: object) -> bool:
    return target.published.kind == UPDATE  # type: ignore[attr-defined]


def field(folder: Path, fleet: Fleet, clock: Clock, server: Faulty, counts: object = None) -> Field:
    site = made(folder, clock, counts)  # type: ignore[arg-type]
    site.repository.publish([fleet.bundle, *fleet.packets], site.targets_keys, site.online)
    server.folder = site.path
    Device.init(fleet.bundle, folder / "store")
    configure(folder / "store", Changes(name="cam", channel=CHANNEL))
    found = Field(site, server, folder / "store", clock, folder)
    found.client().trust(site.root)
    found.roll_out(1)
    assert found.sync().task == 1
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Faulty]:
    with faulty_server(tmp_path) as server:
        yield server


@pytest.fixture
def at(tmp_path: Path, fleet: Fleet, server: Faulty) -> Field:
    return field(tmp_path, fleet, Clock(), server)


def test_frozen_metadata_is_noticed_when_it_expires(at: Field) -> None:
    at.thief()
    at.roll_out(1, 2)
    assert not at.sync().news  # not before then: that is why metadata expires soon
    at.clock.now += 15 * DAY
    before = at.stands()
    with pytest.raises(TrustError, match="expired"):
        at.sync()
    state = last_sync(at.store)
    assert state is not None
    assert state.metadata_expired
    assert at.stands() == before
    at.recovers()
    state = last_sync(at.store)
    assert state is not None
    assert not state.metadata_expired


# rollback: versions that were in force once, and are signed


def test_an_old_repository_is_refused(at: Field) -> None:
    thief = at.thief()
    at.server.folder = at.site.path
    at.roll_out(1, 2)
    at.sync()
    at.server.folder = thief.folder
    at.refuses(TrustError, "refused")


def old_snapshot(thief: Thief, now: Thief) -> None:
    thief.stamp(thief.newest("snapshot").signed.version, timestamp=now_version(now) + 1)


def old_targets(thief: Thief, now: Thief) -> None:
    old = thief.newest("targets")
    _listing(thief, now, "targets", old)


def old_rollout(thief: Thief, now: Thief) -> None:
    old = thief.newest("rollout")
    _listing(thief, now, "rollout", old)


def no_targets(thief: Thief, now: Thief) -> None:
    """A snapshot without an entry, so that its version cannot be compared."""
    snapshot = now.newest("snapshot").signed
    del snapshot.meta["targets.json"]
    snapshot.version += 1
    thief.stamp(snapshot.version, thief.sign("snapshot", snapshot), now_version(now) + 1)


def _listing(thief: Thief, now: Thief, role: str, old: Metadata) -> None:  # type: ignore[type-arg]
    entry = MetaFile.from_data(old.signed.version, old.to_bytes(), ["sha256"])
    current = now.newest("snapshot").signed
    for name in ("targets", "rollout"):  # all else is new
        shutil.copy(now.path(name), thief.folder / "metadata")
    meta = {**current.meta, f"{role}.json": entry}
    thief.settle(meta, current.version + 1, now_version(now) + 1)


def now_version(now: Thief) -> int:
    return int(now.newest("timestamp").signed.version)


@pytest.mark.parametrize("attack", [old_snapshot, old_targets, old_rollout, no_targets])
def test_an_old_version_of_one_role_is_refused(
    at: Field, tmp_path: Path, attack: Callable[[Thief, Thief], None]
) -> None:
    thief = Thief.of(at.site, tmp_path / "old", "snapshot", "timestamp")
    at.site.repository.rotate("targets", RoleChange(), at.site.targets_keys, at.site.online)
    at.roll_out(1, 2)
    at.sync()
    attack(thief, Thief.of(at.site, tmp_path / "now"))
    at.server.folder = thief.folder
    at.refuses(TrustError, "refused", stolen=True)


def test_an_old_root_is_refused(at: Field) -> None:
    thief = at.thief()
    data = thief.path("root", 1).read_bytes()
    thief.path("root", 2).write_bytes(data)
    at.clock.now += DAY
    at.site.repository.refresh(at.site.online)
    shutil.copy(at.site.path / "metadata" / "timestamp.json", thief.path("timestamp"))
    at.refuses(TrustError, "root version")


def test_files_of_two_states_are_refused(at: Field) -> None:
    """Mix-and-match: the new timestamp and snapshot, and the roll-out of before."""
    old = at.thief()
    version = old.newest("rollout").signed.version
    at.roll_out(1, 2)
    new = Thief.of(at.site, at.folder / "new")
    shutil.copy(old.path("rollout", version), new.path("rollout", version + 1))
    at.server.folder = new.folder
    at.refuses(TrustError, "not what it says")


@pytest.mark.parametrize(
    ("part", "days"),
    [
        ("timestamp.json", 0),
        ("root.json", 1),
        ("snapshot.json", 0),
        ("rollout.json", 0),
        ("/rollout/", 0),
        ("/packets/", 0),
    ],
)
def test_data_without_end_is_cut_off(at: Field, part: str, days: int) -> None:
    at.roll_out(1, 2)
    at.clock.now += days * DAY
    at.site.repository.refresh(at.site.online)
    at.server.fault = only(part, endless)
    before, client = at.stands(), at.client()
    with pytest.raises((LinkError, TrustError)):
        within(20, client.sync)
    assert client.fetcher.received < 3_000_000
    assert at.stands() == before
    at.recovers()


def test_a_slow_server_holds_no_device(at: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WINDOW", 0.05)
    monkeypatch.setattr(fetching, "TRIES", 2)

    def slow(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "500")
        handler.end_headers()
        for _ in range(20):
            try:
                handler.wfile.write(b"{")
                handler.wfile.flush()
            except OSError:
                break
            time.sleep(0.03)
        handler.hang_up()
        return True

    at.server.fault = slow
    at.refuses(LinkError, "too slow")


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:-1] + b"!", lambda d: b""])
def test_a_packet_of_another_length_or_digest_is_refused(
    at: Field, change: Callable[[bytes], bytes]
) -> None:
    at.roll_out(1, 2)
    thief = at.thief()
    (step,) = at.steps(2)
    (packet,) = (thief.folder / "targets" / "packets").glob(f"{step.packet}.*")
    packet.write_bytes(change(packet.read_bytes()))
    at.refuses(TrustError, "is not the one")


def test_a_root_that_too_few_have_signed_is_refused(
    tmp_path: Path, fleet: Fleet, server: Faulty
) -> None:
    at = field(tmp_path, fleet, Clock(), server, {"root": 2})
    thief = at.thief("root")
    public = load_public(new_key("thief", tmp_path / "own")[1])
    root: Root = thief.newest("root").signed
    root.version = 2
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.roles[role].keyids.clear()
        root.add_key(Key.from_dict(public.keyid, public.to_dict()), role)
        root.roles[role].threshold = 1
    metadata = Metadata(root)
    metadata.sign(thief.signers["root"][0])
    metadata.sign(load_signer(tmp_path / "own" / "thief.key"), append=True)
    thief.path("root", 2).write_bytes(metadata.to_bytes())
    at.clock.now += DAY  # when a device looks for a new root
    at.site.repository.refresh(at.site.online)
    shutil.copy(at.site.path / "metadata" / "timestamp.json", thief.path("timestamp"))
    at.refuses(TrustError, "refused")


# stolen online keys: rollout, snapshot and timestamp


@pytest.fixture
def robbed(at: Field) -> tuple[Field, Thief]:
    """All that is published is in the thief's repository; the device may go to task 1 so far."""
    return at, at.thief(*ONLINE)


def evil(fleet: Fleet) -> bytes:
    """Packet 2, changed after it was signed."""
    data = bytearray(fleet.packets[1].read_bytes())
    data[-1] ^= 1
    return bytes(data)


def test_a_thief_cannot_publish(robbed: tuple[Field, Thief], fleet: Fleet) -> None:
    """A packet that the role `rollout` lists is none, even with a step of the plan for it."""
    at, thief = robbed
    data = evil(fleet)
    (second,) = at.steps(2)
    name = "packets/update-0002-r0-evil.safetensors"
    step = replace(second, packet=sha256(data), to="ab" * 32)
    thief.roll_out(with_steps(at.plan(1), *at.steps(1), step), {name: data})
    before = at.stands()
    done = at.sync()
    assert done.applied == ()
    assert "no published packets lead" in done.state.waiting
    assert not any("evil" in path for path in at.server.paths)
    assert at.stands() == before
    at.recovers(stolen=True)


def test_a_thief_cannot_pass_off_another_file_as_a_published_packet(
    robbed: tuple[Field, Thief], fleet: Fleet
) -> None:
    at, thief = robbed
    thief.roll_out(at.plan(1, 2))
    (step,) = at.steps(2)
    (packet,) = (thief.folder / "targets" / "packets").glob(f"{step.packet}.*")
    packet.write_bytes(evil(fleet))
    at.refuses(TrustError, "is not the one")


def test_a_thief_cannot_take_a_device_back(robbed: tuple[Field, Thief]) -> None:
    at, thief = robbed
    thief.roll_out(at.plan(1, 2))
    assert at.sync().task == 2  # a thief may hasten what was published
    first = at.steps(1)[0]
    bundle = Device.open(at.store, threads=1).bundle.state.digest
    for plan in (
        at.plan(1),
        at.plan(),
        with_steps(at.plan(), replace(first, to=bundle)),
        with_steps(at.plan(), *at.steps(2), first),
    ):
        thief.roll_out(plan)
        at.sync()
        assert at.stands()[0] == 2
    at.recovers(stolen=True)


def test_a_thief_cannot_change_the_order(robbed: tuple[Field, Thief]) -> None:
    """A step to task 3 alone: the device takes 2 first. It is what was signed, in its order."""
    at, thief = robbed
    thief.roll_out(at.plan(3))
    done = at.sync()
    assert done.applied == tuple(step.packet for step in at.steps(2, 3))
    assert at.stands() == (3, at.steps(3)[0].to)


def test_a_thief_cannot_bring_back_what_was_revoked(
    at: Field, fleet: Fleet, tmp_path: Path
) -> None:
    at.roll_out(1, 2)
    at.sync()
    revoke(fleet.bundle, 2, 0, fleet.key, tmp_path / "back.sdlora")
    at.site.repository.publish([tmp_path / "back.sdlora"], at.site.targets_keys, at.site.online)
    at.sync()
    assert at.stands()[0] == 1
    thief = at.thief(*ONLINE)
    for tasks in ((1, 2), (1, 2, 3), (3,)):
        thief.roll_out(at.plan(*tasks))
        at.sync()
        assert at.stands()[0] == 1
    assert [t for t in at.site.repository.targets() if t.published.kind == REVOCATION]


def test_a_thief_cannot_hide_what_the_device_has_seen(
    at: Field, fleet: Fleet, tmp_path: Path
) -> None:
    """The list of published packets before the revocation: signed offline, and older than seen."""
    thief = Thief.of(at.site, tmp_path / "old", *ONLINE)
    revoke(fleet.bundle, 3, 0, fleet.key, tmp_path / "back.sdlora")
    at.site.repository.publish([tmp_path / "back.sdlora"], at.site.targets_keys, at.site.online)
    at.sync()
    now = Thief.of(at.site, tmp_path / "now")
    thief.settle(
        {}, now.newest("snapshot").signed.version + 1, now.newest("timestamp").signed.version + 1
    )
    at.server.folder = thief.folder
    with pytest.raises(TrustError, match="refused"):
        at.sync()


def test_a_thief_can_hold_a_device_up_and_no_longer_than_until_the_keys_change(
    robbed: tuple[Field, Thief],
) -> None:
    """The largest versions, and a time far ahead, by which everything else has expired."""
    at, thief = robbed
    thief.settle({}, 2**31, 2**31, int(LATER.timestamp()) - 1)
    before = at.stands()
    at.sync()
    for _ in range(2):
        with pytest.raises(TrustError, match="expired"):
            at.sync()
    assert at.stands() == before
    state = last_sync(at.store)
    assert state is not None
    assert state.metadata_expired
    assert state.clock_behind
    at.replace_keys()
    at.server.folder = at.site.path
    at.roll_out(1, 2)
    with pytest.raises(TrustError, match="expired"):
        at.sync()  # which has brought the new root
    assert at.sync().task == 2


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 100_000, b'{"channel":"line-4","format":"sdlora-edge/rollout/1"}']
)
def test_a_plan_that_is_none_stops_nothing(robbed: tuple[Field, Thief], data: bytes) -> None:
    at, thief = robbed
    thief.roll_out(at.plan(1), {f"rollout/{CHANNEL}.json": data})
    before = at.stands()
    with pytest.raises(SdloraError):
        at.sync()
    assert at.stands() == before
    at.server.folder = at.site.path


def test_a_huge_plan_is_not_downloaded(robbed: tuple[Field, Thief]) -> None:
    at, thief = robbed
    signed = replace_version(thief.newest("rollout").signed)
    path = f"rollout/{CHANNEL}.json"
    signed.targets[path] = TargetFile(1 << 40, {"sha256": "ab" * 32}, path)
    thief.rollout(signed)
    with pytest.raises(TrustError, match="bytes, more than"):
        at.sync()
    assert not any(p.startswith("/targets/rollout") for p in at.server.paths[-4:])


def test_metadata_of_another_role_is_no_timestamp(
    tmp_path: Path, fleet: Fleet, server: Faulty
) -> None:
    """One key may sign for two roles; then a snapshot has all signatures of a timestamp."""
    at = field(tmp_path, fleet, Clock(), server)
    thief = at.thief(*ONLINE)
    snapshot = thief.newest("snapshot").signed
    metadata = Metadata(snapshot)
    metadata.sign(thief.signers["timestamp"][0])
    thief.path("timestamp").write_bytes(metadata.to_bytes())
    at.refuses(TrustError, "refused")

"""Changes of keys, revocations and squashes, through the command line, from host to device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, Result, snapshot
from sdlora_edge.export.bundles import export_bundle

from sdlora_edge.device import Device
from sdlora_edge.device.records import Generation
from sdlora_edge.errors import InputError, LimitError, NotForThisDevice, TrustError
from sdlora_edge.formats import container, control, packet, signing
from sdlora_edge.formats.control import Revoked, with_revocation
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.train.run import Run

Cli = Callable[..., Result]


def inputs(device: Device) -> np.ndarray:
    prepare = Preprocessing.from_manifest(device.bundle.manifest.preprocessing)
    return prepare.arrays(
        np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3)).astype(np.uint8)
    )


@dataclass(frozen=True)
class Keys:
    """Three more keys beside the factory's, by name: `folder`/NAME.key and .pub."""

    folder: Path

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def pub(self, name: str) -> Path:
        return self.folder / f"{name}.pub"


@pytest.fixture(scope="session")
def keys(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two", "three"):
        signing.new_key(name, folder)
    for suffix in (".key", ".pub"):
        shutil.copy(fleet.key.with_suffix(suffix), folder / f"factory{suffix}")
    return Keys(folder)


@pytest.fixture
def apply(cli: Cli, store: Path) -> Callable[..., Result]:
    return lambda *packets: cli("device", "apply", *packets, "--store", store)


def refused(result: Result, code: int, word: str) -> None:
    assert (result.code, result.out) == (code, ""), result
    assert word in result.err, result


def unchanged(store: Path, call: Callable[[], Result], code: int, word: str) -> None:
    before = snapshot(store)
    refused(call(), code, word)
    assert snapshot(store) == before


def status(cli: Cli, store: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(cli("device", "status", "--store", store, "--json").out)
    return found


# encodings


@pytest.mark.parametrize("encoding", ["fp32", "int8", "int4"])
def test_a_bundle_of_another_encoding_takes_its_own_packets_only(
    cli: Cli, fleet: Fleet, tmp_path: Path, store: Path, encoding: str
) -> None:
    bundle, packets, own = tmp_path / "bundle", tmp_path / "packets", tmp_path / "own"
    public = fleet.key.with_suffix(".pub")
    made = cli(
        "export",
        "--run",
        fleet.run,
        "--task",
        0,
        "--encoding",
        encoding,
        "--trust",
        public,
        "--out",
        bundle,
    )
    assert made.code == 0, made
    build = (
        "packet",
        "build",
        "--run",
        fleet.run,
        "--bundle",
        bundle,
        "--key",
        fleet.key,
        "--out",
        packets,
    )
    refused(cli(*build, "--encoding", "fp16"), 5, f"takes packets in {encoding}")
    built = json.loads(cli(*build, "--encoding", encoding, "--json").out)["packets"]
    assert [b["encoding"] for b in built] == [encoding] * 3
    run = Run.open(fleet.run).encoded(encoding)
    device = Device.init(bundle, own)
    for b in built:
        device.apply(b["file"])
        assert b["weight_error"] == run.weight_error(b["task"])
        assert device.status().state == run.states[b["task"]].digest
    assert {
        "fp32": b["weight_error"] == 0,
        "int8": 0 < b["weight_error"] < 0.01,
        "int4": 0 < b["weight_error"] < 0.1,
    }[encoding]
    np.testing.assert_array_equal(device._live.state.head_weight, run.states[3].head_weight)
    refused(
        cli("device", "apply", built[0]["file"], "--store", store), 5, "in the bundle's encoding"
    )
    refused(cli("device", "apply", fleet.packets[0], "--store", own), 5, "another lineage")


def test_training_in_an_encoding_and_encoding_anew_is_one_lineage(fleet: Fleet) -> None:
    run = Run.open(fleet.run)
    view = run.encoded("int8")
    assert view.encoded("int8") is view
    assert run.encoded("fp16") is run
    assert len({run.lineage, view.lineage, run.encoded("int4").lineage}) == 3
    back = view.encoded("fp16")
    assert [s.digest for s in back.states] == [s.digest for s in run.states]


def test_build_says_what_a_packet_costs_and_brings(cli: Cli, fleet: Fleet, tmp_path: Path) -> None:
    from conftest import make_images

    classes = Run.open(fleet.run).states[3].classes
    folder = make_images(tmp_path / "images", list(classes), 2)
    command = (
        "packet",
        "build",
        "--run",
        fleet.run,
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--data",
        folder,
    )
    (built, *_) = json.loads(cli(*command, "--out", tmp_path / "a", "--task", 3, "--json").out)[
        "packets"
    ]
    assert set(built["accuracy"]) == {"before", "after", "after_without_old_rows", "images"}
    assert built["accuracy"]["images"] == 20
    head = Run.open(fleet.run).updates[2].head
    parts = (head.index, head.left, head.right, head.scale, head.bias)
    assert built["old_rows"] == len(head.index)
    assert built["old_rows_bytes"] == sum(part.nbytes for part in parts)
    shown = cli(*command, "--out", tmp_path / "b", "--task", 3).out
    assert "weight error" in shown
    assert "20 inputs" in shown


# keys


def two_of_three(cli: Cli, fleet: Fleet, keys: Keys, out: Path) -> Path:
    """A trust packet: from the factory's key alone to two of one, two, three."""
    options = [o for name in ("one", "two", "three") for o in ("--add", keys.pub(name))]
    command = (
        "packet",
        "trust",
        "--bundle",
        fleet.bundle,
        *options,
        "--remove",
        keys.pub("factory"),
        "--threshold",
        2,
    )
    made = cli(*command, "--key", fleet.key, "--key", keys.key("one"), "--out", out, "--json")
    value = json.loads(made.out)
    assert value["signatures"] == {"old": [1, 1], "new": [1, 2]}
    assert not value["complete"]
    return out


def test_keys_rotate_when_old_and_new_ones_have_signed(
    cli: Cli, fleet: Fleet, keys: Keys, store: Path, tmp_path: Path, apply: Callable[..., Result]
) -> None:
    first, second, _ = fleet.packets
    assert apply(first).code == 0
    rotation = two_of_three(cli, fleet, keys, tmp_path / "keys.sdlora")
    unchanged(store, lambda: apply(rotation), 4, "new keys have not signed")
    assert cli("packet", "sign", rotation, "--key", keys.key("two")).code == 0
    refused(cli("packet", "sign", rotation, "--key", keys.key("two")), 7, "signed it already")
    assert (
        "keys of version 2, 2 of 3"
        in cli("packet", "verify", rotation, "--bundle", fleet.bundle).out
    )
    before = Device.open(store).logits(inputs(Device.open(store)))
    assert apply(rotation).code == 0
    assert status(cli, store)["trust_version"] == 2
    unchanged(store, lambda: apply(rotation), 7, "applied already")
    unchanged(store, lambda: apply(first), 7, "applied already")  # whoever signs now
    unchanged(
        store, lambda: apply(second), 4, "signature refused"
    )  # the factory's key is no longer obeyed
    # the packet under the old keys is still good, and nothing was computed anew
    np.testing.assert_array_equal(Device.open(store).logits(inputs(Device.open(store))), before)
    build = (
        "packet",
        "build",
        "--run",
        fleet.run,
        "--bundle",
        fleet.bundle,
        "--task",
        2,
        "--out",
        tmp_path / "new",
    )
    refused(cli(*build, "--key", fleet.key, "--after", rotation), 4, "does not trust key")
    half = json.loads(cli(*build, "--key", keys.key("three"), "--after", rotation, "--json").out)[
        "packets"
    ][0]
    assert (half["signatures"], half["threshold"]) == (1, 2)
    unchanged(store, lambda: apply(half["file"]), 4, "2 good signature(s)")
    assert cli("packet", "sign", half["file"], "--key", keys.key("one")).code == 0
    # built again, as every week, it keeps what others have signed
    again = json.loads(cli(*build, "--key", keys.key("three"), "--after", rotation, "--json").out)[
        "packets"
    ][0]
    assert (again["file"], again["signatures"]) == (half["file"], 2)
    assert (
        "good, task 2"
        in cli("packet", "verify", half["file"], "--bundle", fleet.bundle, "--after", rotation).out
    )
    # but never one of our own that does not hold
    data = Path(half["file"]).read_bytes()
    ours = signing.load_public(Path(keys.pub("three"))).keyid
    (good,) = [
        s["sig"].encode()
        for s in json.loads(container.opened(data)[0])["signatures"]
        if s["keyid"] == ours
    ]
    Path(half["file"]).write_bytes(
        data.replace(good, (b"B" if good[:1] == b"A" else b"A") + good[1:])
    )
    assert cli(*build, "--key", keys.key("three"), "--after", rotation).code == 0
    assert good in Path(half["file"]).read_bytes()
    Path(half["file"]).write_bytes(data)
    order = (
        "packet",
        "revoke",
        "--bundle",
        fleet.bundle,
        "--task",
        2,
        "--key",
        keys.key("one"),
        "--after",
        rotation,
    )
    assert "signed by 1 of the 2 keys" in cli(*order, "--out", tmp_path / "revocation.sdlora").out
    assert apply(half["file"]).code == 0
    # rolled back to before the change of keys: keys stay, each packet is verified with its own
    for task in (1, 0):
        assert cli("device", "rollback", "--store", store).code == 0
        assert (status(cli, store)["task"], status(cli, store)["trust_version"]) == (task, 2)
    unchanged(
        store,
        lambda: cli("device", "apply", first, "--store", store, "--allow-older"),
        4,
        "signature refused",
    )


def test_an_old_trust_packet_never_comes_back(
    cli: Cli, fleet: Fleet, keys: Keys, store: Path, tmp_path: Path, apply: Callable[..., Result]
) -> None:
    """Version 2 adds a key and version 3 removes it. Version 2 still has good signatures."""
    two, three = tmp_path / "2.sdlora", tmp_path / "3.sdlora"
    common = ("packet", "trust", "--bundle", fleet.bundle, "--key", fleet.key)
    assert cli(*common, "--add", keys.pub("one"), "--out", two).code == 0
    assert cli(*common, "--remove", keys.pub("one"), "--after", two, "--out", three).code == 0
    assert apply(two, three).code == 0
    unchanged(store, lambda: apply(two), 7, "applied already")
    countersigned = tmp_path / "2b.sdlora"
    assert cli("packet", "sign", two, "--key", keys.key("one"), "--out", countersigned).code == 0
    unchanged(
        store, lambda: apply(countersigned), 4, "version 2, and this device has seen version 3"
    )
    # nor does the host build on one that comes too late, or on a packet that changes no keys
    again = (*common, "--add", keys.pub("one"), "--out", tmp_path / "4.sdlora")
    for after, code, word in (
        ([two, three, two], 4, "version 2"),
        ([two, two], 7, "in force already"),
        (fleet.packets[:1], 3, "no keys"),
    ):
        refused(
            cli(*again, *(option for path in after for option in ("--after", path))), code, word
        )


def test_senseless_trust_packets_cannot_be_made(
    cli: Cli, fleet: Fleet, keys: Keys, tmp_path: Path
) -> None:
    def trust(*options: object, key: str = "factory") -> Result:
        return cli(
            "packet",
            "trust",
            "--bundle",
            fleet.bundle,
            "--key",
            keys.key(key),
            "--out",
            tmp_path / "t.sdlora",
            *options,
        )

    refused(trust(), 7, "in force already")
    refused(trust("--threshold", 2), 2, "threshold of 2 with 1 key")
    refused(trust("--remove", keys.pub("factory")), 2, "with 0 key")
    refused(trust("--remove", keys.pub("one")), 2, "not in force")
    refused(trust("--add", keys.pub("one"), key="two"), 4, "neither among the old keys")
    refused(trust("--add", "nobody"), 3, "no key 'nobody'")
    assert not list(tmp_path.iterdir())


def test_a_trust_packet_that_the_old_keys_have_not_signed(
    fleet: Fleet, keys: Keys, store: Path, tmp_path: Path, apply: Callable[..., Result]
) -> None:
    """The attacker's own keys, signed by themselves, and a threshold that cannot be met."""
    mine = signing.load_signer(keys.key("one"))
    trust = signing.Trust((mine.public_key,), 1, 2)
    (tmp_path / "mine.sdlora").write_bytes(
        control.build_trust(trust, lambda p: signing.sign(p, [mine]))
    )
    unchanged(store, lambda: apply(tmp_path / "mine.sdlora"), 4, "signature refused")
    factory = signing.load_signer(fleet.key)
    for name, value in {
        "none": {"version": 2, "threshold": 1, "keys": {}},
        "many": {**trust.to_dict(), "threshold": 2},
        "zero": {**trust.to_dict(), "threshold": 0},
        "old": {**trust.to_dict(), "version": 0},
        "huge": {**trust.to_dict(), "version": 10**9},
        "more": {**trust.to_dict(), "comment": "hello"},
        "list": [],
    }.items():
        data = container.seal(
            {"kind": "trust", "trust": value}, {}, lambda p: signing.sign(p, [factory, mine])
        )
        (tmp_path / f"{name}.sdlora").write_bytes(data)
        before = snapshot(store)
        assert apply(tmp_path / f"{name}.sdlora").code == 3, name
        assert snapshot(store) == before


def test_one_key_signs_once_and_a_damaged_file_is_not_signed(
    fleet: Fleet, keys: Keys, tmp_path: Path, cli: Cli
) -> None:
    copy = tmp_path / "p.sdlora"
    shutil.copy(fleet.packets[0], copy)
    refused(cli("packet", "sign", copy, "--key", fleet.key), 7, "signed it already")
    assert (
        cli("packet", "sign", copy, "--key", keys.key("one"), "--out", tmp_path / "q.sdlora").code
        == 0
    )
    both = signing.Trust((*fleet.trust.keys, signing.load_public(keys.pub("one"))), 2)
    assert packet.read((tmp_path / "q.sdlora").read_bytes(), both).sequence == 1
    with pytest.raises(TrustError, match="2 good"):
        packet.read(copy.read_bytes(), both)
    copy.write_bytes(copy.read_bytes()[:-1] + b"\1")
    refused(cli("packet", "sign", copy, "--key", keys.key("one")), 3, "was not signed")
    build = (
        "packet",
        "build",
        "--run",
        fleet.run,
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--key",
        fleet.key,
    )
    refused(cli(*build, "--out", tmp_path / "x"), 2, "one key twice")


# revocation


@pytest.fixture(scope="session")
def retrained(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fleet's run, with its tasks 2 and 3 learned in another way (their magnitudes differ)."""
    from dataclasses import replace

    from sdlora_edge.state import advance
    from sdlora_edge.train.tasks import TaskResult, write_task

    path = tmp_path_factory.mktemp("retrained") / "run"
    shutil.copytree(fleet.run, path)
    old = Run.open(path)
    kept, states = old.kept, [*old.states[:2]]
    for update in [*old.updates[1:]]:
        learned = old.learned(update.task)
        shutil.rmtree(path / "tasks" / f"{update.task:03d}")
        new = replace(update, deltas=update.deltas + 2.0**-10)
        states.append(advance(states[-1], new))
        write_task(path, TaskResult(new, kept, learned), states[-1].digest)
    return path


def revocation(cli: Cli, fleet: Fleet, out: Path, task: int = 2, revision: int = 0) -> Path:
    options = ("--task", task, "--revision", revision, "--key", fleet.key, "--out", out)
    result = cli("packet", "revoke", "--bundle", fleet.bundle, *options)
    assert result.code == 0, result
    return out


def revised(cli: Cli, fleet: Fleet, run: Path, out: Path) -> list[Path]:
    """Tasks 2 and 3 of the retrained run, as revision 1."""
    common = (
        "packet",
        "build",
        "--run",
        run,
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--out",
        out,
    )
    made = cli(*common, "--task", 2, "--revision", 1, "--json")
    assert made.code == 0, made
    assert json.loads(made.out)["packets"][0]["revision"] == 1
    later = cli(*common, "--task", 3, "--json")
    assert json.loads(later.out)["packets"][0]["revision"] == 1  # those after it follow
    refused(cli(*common, "--task", 2, "--revision", 0), 2, "built packets of revision 1")
    refused(cli(*common, "--revision", 2), 2, "goes with --task")
    return sorted(out.iterdir())


def test_a_revoked_task_is_taken_back_and_replaced(
    cli: Cli,
    fleet: Fleet,
    store: Path,
    retrained: Path,
    tmp_path: Path,
    apply: Callable[..., Result],
) -> None:
    first, second, third = fleet.packets
    device = Device.open(store)
    device.apply(first)
    seen = device.logits(inputs(device))
    assert apply(second, third).code == 0
    new2, new3 = revised(cli, fleet, retrained, tmp_path / "new")
    unchanged(store, lambda: apply(new2), 5, "roll back to task 1, or apply the revocation")
    order = revocation(cli, fleet, tmp_path / "revocation.sdlora")
    assert apply(order).code == 0
    again = Device.open(store)
    assert (again.status().task, again.status().revoked) == (1, ((2, 0),))
    np.testing.assert_array_equal(again.logits(inputs(again)), seen)
    unchanged(store, lambda: apply(order), 7, "revoked already")
    for older in ((), ("--allow-older",)):
        unchanged(
            store,
            lambda older=older: cli("device", "apply", second, "--store", store, *older),
            4,
            "was revoked",
        )
    assert apply(new2, new3).code == 0
    assert (status(cli, store)["task"], status(cli, store)["revision"]) == (3, 1)
    unchanged(store, lambda: apply(order), 7, "revoked already")  # replayed: the revised task stays
    assert cli("device", "rollback", "--store", store).code == 0
    assert cli("device", "rollback", "--store", store).code == 0
    unchanged(
        store,
        lambda: cli("device", "apply", second, "--store", store, "--allow-older"),
        4,
        "was revoked",
    )
    assert cli("device", "apply", new2, "--store", store, "--allow-older").code == 0


def test_a_device_that_rolled_back_takes_the_revision_and_never_the_old_task(
    cli: Cli,
    fleet: Fleet,
    store: Path,
    retrained: Path,
    tmp_path: Path,
    apply: Callable[..., Result],
) -> None:
    """Without any revocation packet: taking revision 1 is enough to refuse revision 0 for ever."""
    assert apply(*fleet.packets).code == 0
    for _ in range(2):
        cli("device", "rollback", "--store", store)
    new2, _ = revised(cli, fleet, retrained, tmp_path / "new")
    assert apply(new2).code == 0
    cli("device", "rollback", "--store", store)
    unchanged(
        store,
        lambda: cli("device", "apply", fleet.packets[1], "--store", store, "--allow-older"),
        4,
        "was revoked",
    )
    unchanged(store, lambda: apply(new2), 4, "--allow-older")


def test_a_revocation_reaches_devices_that_do_not_hold_the_task_too(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path, apply: Callable[..., Result]
) -> None:
    order = revocation(cli, fleet, tmp_path / "revocation.sdlora", task=1)
    assert apply(order).code == 0
    assert status(cli, store)["task"] == 0
    unchanged(store, lambda: apply(fleet.packets[0]), 4, "was revoked")
    unchanged(
        store,
        lambda: apply(revocation(cli, fleet, tmp_path / "less.sdlora", task=3)),
        7,
        "revoked already",
    )
    assert apply(revocation(cli, fleet, tmp_path / "more.sdlora", task=2, revision=5)).code == 0
    assert status(cli, store)["revoked"] == [[1, 0], [2, 5]]


def test_a_revocation_for_others_and_one_of_the_bundle_itself(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    signer = signing.load_signer(fleet.key)
    (tmp_path / "other.sdlora").write_bytes(
        control.build_revocation("ab" * 32, Revoked(1, 0), lambda p: signing.sign(p, [signer]))
    )
    unchanged(
        store,
        lambda: cli("device", "apply", tmp_path / "other.sdlora", "--store", store),
        5,
        "another lineage",
    )
    export_bundle(
        Run.open(fleet.run), tmp_path / "bundle2", 2, [str(fleet.key.with_suffix(".pub"))]
    )
    Device.init(tmp_path / "bundle2", tmp_path / "store2")
    order = revocation(cli, fleet, tmp_path / "revocation.sdlora", task=2)
    late = lambda: cli("device", "apply", order, "--store", tmp_path / "store2")  # noqa: E731
    unchanged(tmp_path / "store2", late, 5, "part of the bundle itself")
    arguments = (
        "packet",
        "revoke",
        "--bundle",
        tmp_path / "bundle2",
        "--task",
        2,
        "--key",
        fleet.key,
        "--out",
        tmp_path / "r",
    )
    refused(cli(*arguments), 2, "--task 2")


def test_a_revocation_of_a_task_that_a_bundle_holds_below_a_newer_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    """The bundle's last task is of revision 1, the one before it is the revoked one."""
    run = shutil.copytree(fleet.run, tmp_path / "run")
    Run.open(run).revise(2, 1)
    export_bundle(Run.open(run), tmp_path / "bundle", 2, [str(fleet.key.with_suffix(".pub"))])
    device = Device.init(tmp_path / "bundle", tmp_path / "store")
    assert device.bundle.manifest.revisions == (0, 1)
    signer = signing.load_signer(fleet.key)
    for named, holds in ((Revoked(1, 0), "1"), (Revoked(1, 1), "1"), (Revoked(2, 1), "2")):
        data = control.build_revocation(
            Run.open(run).lineage, named, lambda payload: signing.sign(payload, [signer])
        )
        (tmp_path / "revocation.sdlora").write_bytes(data)
        with pytest.raises(NotForThisDevice, match=f"revoked task {holds} is part of the bundle"):
            device.apply(tmp_path / "revocation.sdlora")


def test_revocations_that_others_cover_are_not_kept() -> None:
    known = with_revocation(with_revocation((), Revoked(3, 1)), Revoked(5, 0))
    assert known == (Revoked(3, 1),)
    assert with_revocation(known, Revoked(2, 4)) == (Revoked(2, 4),)
    assert with_revocation(known, Revoked(6, 2)) == (Revoked(3, 1), Revoked(6, 2))


def test_a_record_that_no_device_writes_is_not_read() -> None:
    from sdlora_edge.formats.canonical import dump_json, parse_json, sha256

    record = Generation(2, "confirmed", ("ab" * 32,), 1)
    assert Generation.from_json(record.to_json()) == record
    body = parse_json(record.to_json(), "x")
    del body["checksum"]
    bad = {"sequence": -1, "revision": 0}
    for changes in (
        {"status": "pending"},
        {"before": body},
        {"status": "fine", "before": body},
        {"trust": [["ab" * 32, 2]]},
        {"trust": [[5, 0]]},
        {"revoked": [[1, 2]]},
        {"revoked": [bad]},
        {"revision": -1},
    ):
        damaged = {**body, **changes}
        with pytest.raises(InputError):
            Generation.from_json(dump_json({**damaged, "checksum": sha256(dump_json(damaged))}))


# squash


def test_a_squash_leads_to_the_same_state_to_the_bit(
    cli: Cli, fleet: Fleet, store: Path, tmp_path: Path, apply: Callable[..., Result]
) -> None:
    single = Device.open(store)
    for path in fleet.packets:
        single.apply(path)
    whole, later = tmp_path / "1-3.sdlora", tmp_path / "2-3.sdlora"
    made = cli(
        "packet", "squash", *fleet.packets[::-1], "--key", fleet.key, "--out", whole, "--json"
    )
    value = json.loads(made.out)
    assert (value["from_task"], value["to_task"], len(value["classes"])) == (0, 3, 6)
    assert value["bytes"] < value["single_bytes"]
    assert cli("packet", "squash", *fleet.packets[1:], "--key", fleet.key, "--out", later).code == 0
    fresh = Device.init(fleet.bundle, tmp_path / "fresh")
    assert fresh.apply(whole).task == 3
    assert fresh.status().state == single.status().state
    assert fresh.logits(inputs(fresh)).tobytes() == single.logits(inputs(single)).tobytes()
    half = Device.init(fleet.bundle, tmp_path / "half")
    half.apply(fleet.packets[0])
    assert half.apply(later).state == single.status().state
    assert half.rollback().task == 1
    # a squash over a state the device is not in
    other = Device.init(fleet.bundle, tmp_path / "other")
    unchanged(
        tmp_path / "other",
        lambda: cli("device", "apply", later, "--store", tmp_path / "other"),
        5,
        "apply 1 first",
    )
    other.apply(fleet.packets[0])
    unchanged(
        tmp_path / "other",
        lambda: cli("device", "apply", whole, "--store", tmp_path / "other"),
        5,
        "this device is between",
    )
    unchanged(store, lambda: apply(whole), 7, "applied already")


def test_a_squash_of_another_chain_or_with_a_gap_is_refused(
    cli: Cli, fleet: Fleet, keys: Keys, retrained: Path, store: Path, tmp_path: Path
) -> None:
    first, second, third = fleet.packets
    new2, new3 = revised(cli, fleet, retrained, tmp_path / "new")
    out = tmp_path / "squash.sdlora"

    def squash(*files: Path, key: Path = fleet.key) -> Result:
        return cli("packet", "squash", *files, "--key", key, "--out", out)

    refused(squash(first), 2, "name two or more")
    refused(squash(first, third), 5, "does not follow from packet 1")
    refused(squash(first, first), 5, "does not follow")
    refused(squash(second, new3), 5, "does not follow from packet 2")
    refused(squash(first, second, key=keys.key("one")), 4, "signature refused")
    (tmp_path / "cut.sdlora").write_bytes(second.read_bytes()[:-1])
    refused(squash(first, tmp_path / "cut.sdlora"), 3, "")
    assert not out.exists()
    assert squash(new2, new3).code == 0
    device = Device.open(store)
    device.apply(first)
    device.apply(second)
    unchanged(
        store, lambda: cli("device", "apply", out, "--store", store), 5, "roll back to task 1"
    )
    assert cli("device", "rollback", "--store", store).code == 0
    assert cli("device", "apply", out, "--store", store).code == 0
    assert (
        cli(
            "device", "apply", revocation(cli, fleet, tmp_path / "r.sdlora", 3, 1), "--store", store
        ).code
        == 0
    )
    assert status(cli, store)["task"] == 1  # the squash goes as a whole


def test_a_squash_no_device_would_read_is_not_written(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [packet.read(path.read_bytes(), fleet.trust) for path in fleet.packets]
    signer = signing.load_signer(fleet.key)
    monkeypatch.setattr(container.opened, "__defaults__", (container.Limits(packet=10_000),))
    with pytest.raises(LimitError, match="more than the 10000"):
        packet.squash(read, lambda p: signing.sign(p, [signer]))
    monkeypatch.undo()
    whole = packet.squash(read, lambda p: signing.sign(p, [signer]))
    with pytest.raises(InputError, match="not a list of 1 to 2"):
        packet.read(whole, fleet.trust, container.Limits(tasks=2))

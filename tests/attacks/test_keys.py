"""Attacks on who may sign: packets of strangers, of too few, and on the way that keys change."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from attacks_kit import Cli, Victim, said_no
from conftest import Fleet
from forge import Draft, joined, split
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.formats import control, signing
from sdlora_edge.formats.canonical import dump_json, sha256
from sdlora_edge.formats.control import Revoked
from sdlora_edge.train.run import Run


@dataclass(frozen=True)
class Pair:
    """A device that wants both of two keys, at task 1."""

    victim: Victim
    keys: tuple[Any, Any]


@pytest.fixture
def pair(cli: Cli, fleet: Fleet, victim: Victim, tmp_path: Path) -> Pair:
    signers = (victim.signer, signing.load_signer(signing.new_key("second", tmp_path / "keys")[0]))
    publics = [str(fleet.key.with_suffix(".pub")), str(tmp_path / "keys" / "second.pub")]
    export_bundle(Run.open(fleet.run), tmp_path / "two", 0, publics, ExportOptions(threshold=2))
    first = victim.file(Draft(fleet.packets[0]).sealed(*signers), "first.sdlora")
    Device.init(tmp_path / "two", tmp_path / "two store").apply(first)
    return Pair(replace(victim, store=tmp_path / "two store"), signers)


def resigned(data: bytes, change: Any) -> bytes:
    """The same file with another list of signatures."""
    envelope, _, table, content = split(data)
    envelope["signatures"] = change(envelope["signatures"])
    return joined(dump_json(envelope).decode(), table, content)


def test_unknown_key(victim: Victim, stranger: Any) -> None:
    draft = Draft(victim.next)
    victim.refuses(draft.sealed(stranger), 4, "signature refused")
    # under the name of the key that the device knows
    known = victim.signer.public_key.keyid
    forged = resigned(draft.sealed(stranger), lambda found: [{**found[0], "keyid": known}])
    victim.refuses(forged, 4, "signature refused")


def test_no_signature(victim: Victim) -> None:
    victim.refuses(resigned(victim.next.read_bytes(), lambda found: []), 3, "0 signatures")


def test_signature_of_another_packet(victim: Victim, fleet: Fleet) -> None:
    """TUF: mix and match. One packet's envelope, or its signature, on another packet."""
    one, two = (path.read_bytes() for path in fleet.packets[1:3])
    envelope, _, _, _ = split(one)
    other, _, table, content = split(two)
    victim.refuses(joined(dump_json(envelope).decode(), table, content), 3, "damaged")
    victim.refuses(
        joined(dump_json({**other, "signatures": envelope["signatures"]}).decode(), table, content),
        4,
        "signature refused",
    )


def test_signatures_below_threshold(pair: Pair, stranger: Any) -> None:
    draft = Draft(pair.victim.next)
    for signers in ([pair.keys[0]], [pair.keys[1]], [pair.keys[0], stranger]):
        pair.victim.refuses(draft.sealed(*signers), 4, "2 good signature(s)")
    assert pair.victim.apply(draft.sealed(*pair.keys, stranger)).code == 0


def test_the_same_key_twice(pair: Pair) -> None:
    """One key does not count twice: by two signatures, under two names, or with a changed name."""
    one = Draft(pair.victim.next).sealed(pair.keys[0])
    second = pair.keys[1].public_key.keyid
    pair.victim.refuses_each(
        [
            (resigned(one, lambda found: found * 2), 3, "malformed"),
            (
                resigned(one, lambda found: [*found, {**found[0], "keyid": second}]),
                4,
                "2 good signature(s)",
            ),
            (
                resigned(
                    one, lambda found: [*found, {**found[0], "keyid": found[0]["keyid"].upper()}]
                ),
                3,
                "malformed",
            ),
            (
                resigned(one, lambda found: [*found, {**found[0], "keyid": "0" * 64}]),
                4,
                "2 good signature(s)",
            ),
        ]
    )
    assert pair.victim.apply(Draft(pair.victim.next).sealed(*pair.keys)).code == 0


def test_a_bundle_that_names_one_key_twice(cli: Cli, fleet: Fleet, tmp_path: Path) -> None:
    """Nor can `trust.json` name it twice."""
    trust = fleet.trust.to_dict()
    (key,) = trust["keys"].values()
    trust |= {"threshold": 2, "keys": {**trust["keys"], "ab" * 32: key}}
    shutil.copytree(fleet.bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "trust.json").write_bytes(dump_json(trust))
    result = cli("device", "init", "--bundle", tmp_path / "bundle", "--store", tmp_path / "store")
    assert result.code == 3
    assert not (tmp_path / "store").exists()


def rotation(
    victim: Victim, version: int, threshold: int, keys: list[Any], signers: list[Any]
) -> bytes:
    trust = signing.Trust(tuple(key.public_key for key in keys), threshold, version)
    return control.build_trust(trust, lambda payload: signing.sign(payload, signers))


def test_trust_packet_signed_by_new_keys_only(victim: Victim, stranger: Any) -> None:
    victim.refuses(rotation(victim, 2, 1, [stranger], [stranger]), 4, "signature refused")


def test_trust_packet_signed_by_old_keys_only(victim: Victim, stranger: Any) -> None:
    victim.refuses(
        rotation(victim, 2, 1, [stranger], [victim.signer]), 4, "new keys have not signed"
    )
    victim.refuses(
        rotation(victim, 2, 2, [stranger, victim.signer], [victim.signer]),
        4,
        "new keys have not signed",
    )


def test_replayed_old_trust_packet(victim: Victim, fleet: Fleet, stranger: Any) -> None:
    """A key that was added and removed does not come back with the packet that added it."""
    both = [victim.signer, stranger]
    two = rotation(victim, 2, 1, both, [victim.signer])
    three = rotation(victim, 3, 1, [victim.signer], [victim.signer])
    assert victim.apply(two, three).code == 0
    draft = Draft(victim.next)
    victim.refuses_each(
        [
            (two, 7, "applied already"),  # it changes nothing
            (
                rotation(victim, 2, 1, both, both),
                4,
                "version 2, and this device has seen version 3",
            ),
            (three, 7, "applied already"),
            (rotation(victim, 3, 1, [victim.signer], both), 7, "in force already"),
            (rotation(victim, 1, 1, [stranger], [victim.signer, stranger]), 4, "version 1"),
            (rotation(victim, 3, 1, [stranger], [victim.signer, stranger]), 4, "version 3"),
            (draft.sealed(stranger), 4, "signature refused"),
        ]
    )


def test_a_key_that_was_replaced_signs_nothing(victim: Victim, fleet: Fleet, stranger: Any) -> None:
    """TUF: key compromise. A stolen key that was replaced is worthless, even after a rollback."""
    assert victim.apply(rotation(victim, 2, 1, [stranger], [victim.signer, stranger])).code == 0
    draft = Draft(victim.next)
    victim.refuses(draft.sealed(victim.signer), 4, "signature refused")
    assert victim.cli("device", "rollback", "--store", victim.store).code == 0
    victim.refuses(draft.sealed(victim.signer), 4, "signature refused")
    revocation = control.build_revocation(
        draft.manifest["lineage"], Revoked(1, 0), lambda p: signing.sign(p, [victim.signer])
    )
    victim.refuses(revocation, 4, "signature refused")
    first = Draft(fleet.packets[0]).sealed(stranger)
    again = victim.cli(
        "device", "apply", victim.file(first), "--store", victim.store, "--allow-older"
    )
    assert again.code == 0, again
    assert victim.apply(draft.sealed(stranger)).code == 0


def test_senseless_trust_packets_that_the_keys_have_signed(victim: Victim) -> None:
    changes: list[dict[str, Any]] = [
        {"threshold": 0},
        {"threshold": -1},
        {"threshold": 2},
        {"threshold": True},
        {"threshold": 1.0},
        {"threshold": None},
        {"keys": {}},
        {"keys": []},
        {"keys": {"../x": {}}},
        {
            "keys": {
                "\x1b[2J" * 50: {
                    "keytype": "ed25519",
                    "scheme": "ed25519",
                    "keyval": {"public": "0" * 64},
                }
            }
        },
        {
            "keys": {
                "0" * 64: {
                    "keytype": "rsa\x1b[31m",
                    "scheme": "x" * 5000,
                    "keyval": {"public": "0"},
                }
            }
        },
        {"version": 0},
        {"version": 10**7},
        {"version": 1.5},
        {"version": [[[]]]},
        {"more": 1},
    ]
    drafts = [Draft(rotation(victim, 2, 1, [victim.signer], [victim.signer])) for _ in changes]
    for change, draft in zip(changes, drafts, strict=True):
        draft.manifest["trust"] |= change
    more = Draft(rotation(victim, 2, 1, [victim.signer], [victim.signer]))
    more.manifest["lineage"] = Draft(victim.next).manifest["lineage"]
    victim.refuses_each((draft.sealed(victim.signer), 3, "") for draft in [*drafts, more])


def key_entry(public: str, **more: Any) -> dict[str, Any]:
    keyid = sha256(dump_json({"keytype": "ed25519", "scheme": "ed25519", "public": public}))
    return {
        keyid: {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public}, **more}
    }


def test_trust_packets_with_a_key_that_anybody_signs_for(victim: Victim) -> None:
    """Of small or mixed order, or not canonical: for some, a constant signs everything."""
    publics = [
        "01" + "00" * 31,
        "ec" + "ff" * 30 + "7f",
        "00" * 32,
        "ee" + "ff" * 30 + "7f",
        "01" + "00" * 30 + "80",
    ]
    mixed = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
    for public in (*publics, mixed):
        draft = Draft(rotation(victim, 2, 1, [victim.signer], [victim.signer]))
        draft.manifest["trust"]["keys"] |= key_entry(public)
        victim.refuses(draft.sealed(victim.signer), 3, "is not a sound Ed25519 key")


def test_unknown_fields_inside_a_key(victim: Victim) -> None:
    ours = victim.signer.public_key.keyval["public"]
    entries = [
        key_entry(ours, more=1),
        key_entry(ours, keyid="ab" * 32),
        key_entry(ours, keyval={"public": ours, "private": None}),
    ]
    for entry in entries:
        draft = Draft(rotation(victim, 2, 1, [victim.signer], [victim.signer]))
        draft.manifest["trust"]["keys"] = entry
        victim.refuses(draft.sealed(victim.signer), 3, "more fields than")


def test_a_bundle_with_a_key_that_anybody_signs_for(cli: Cli, fleet: Fleet, tmp_path: Path) -> None:
    shutil.copytree(fleet.bundle, tmp_path / "bundle")
    trust = dump_json({"version": 1, "threshold": 1, "keys": key_entry("01" + "00" * 31)})
    (tmp_path / "bundle" / "trust.json").write_bytes(trust)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    manifest["files"]["trust.json"] = {"sha256": sha256(trust), "size": len(trust)}
    (tmp_path / "bundle" / "manifest.json").write_bytes(dump_json(manifest))
    said_no(
        cli("device", "init", "--bundle", tmp_path / "bundle", "--store", tmp_path / "store"),
        3,
        "is not a sound Ed25519 key",
    )
    assert not (tmp_path / "store").exists()


def test_a_public_key_that_anybody_signs_for_enters_no_bundle(
    cli: Cli, fleet: Fleet, tmp_path: Path
) -> None:
    ((keyid, entry),) = key_entry("01" + "00" * 31).items()
    (tmp_path / "weak.pub").write_bytes(dump_json({"keyid": keyid, **entry}))
    command = (
        "export",
        "--run",
        fleet.run,
        "--out",
        tmp_path / "bundle",
        "--trust",
        tmp_path / "weak.pub",
    )
    said_no(cli(*command), 3, "is not a sound Ed25519 key")
    out = tmp_path / "keys.sdlora"
    rotate = (
        "packet",
        "trust",
        "--bundle",
        fleet.bundle,
        "--key",
        fleet.key,
        "--add",
        tmp_path / "weak.pub",
        "--out",
        out,
    )
    said_no(cli(*rotate), 3, "is not a sound Ed25519 key")
    assert not (tmp_path / "bundle").exists()


def test_a_packet_for_another_purpose_gets_no_signature(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else our key would sign what another program obeys, in a file that looks like a packet."""
    with monkeypatch.context() as other:
        other.setattr(signing, "PAYLOAD_TYPE", "application/vnd.in-toto+json")
        path = victim.file(Draft(victim.next).sealed(victim.signer))
    before = path.read_bytes()
    signing.new_key("another", victim.folder)
    said_no(
        victim.cli("packet", "sign", path, "--key", victim.folder / "another.key"),
        4,
        "another purpose",
    )
    assert path.read_bytes() == before


def test_more_keys_than_may_sign(victim: Victim) -> None:
    """All of 16 keys can sign. With a 17th, no device would read a packet that all have signed."""
    value = signing.Trust((victim.signer.public_key,), 1, 2).to_dict()
    for number in range(16):
        public = {"keytype": "ed25519", "scheme": "ed25519", "public": f"{number:064x}"}
        key = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": f"{number:064x}"}}
        value["keys"][sha256(dump_json(public))] = key
    draft = Draft(rotation(victim, 2, 1, [victim.signer], [victim.signer]))
    draft.manifest["trust"] = value
    victim.refuses(draft.sealed(victim.signer), 3, "17 keys")


def test_a_packet_of_another_version_is_not_signed(victim: Victim) -> None:
    """Whoever adds a signature does not vouch for what this program cannot read."""
    draft = Draft(victim.next)
    draft.manifest["format"] = "sdlora-edge/packet/4"
    path = victim.file(draft.sealed(victim.signer))
    signing.new_key("another", victim.folder)
    before = path.read_bytes()
    said_no(
        victim.cli("packet", "sign", path, "--key", victim.folder / "another.key"),
        3,
        "was not signed",
    )
    assert path.read_bytes() == before


def test_a_packet_signed_for_another_purpose(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(signing, "PAYLOAD_TYPE", "application/vnd.in-toto+json")
        data = Draft(victim.next).sealed(victim.signer)
    victim.refuses(data, 4, "another purpose")


def test_a_signature_written_another_way(victim: Victim) -> None:
    """Base64 with other padding, or another encoding of a point: a packet has one form."""
    good = victim.next.read_bytes()

    def with_sig(change: Any) -> bytes:
        return resigned(good, lambda found: [{**found[0], "sig": change(found[0]["sig"])}])

    victim.refuses_each(
        [
            (with_sig(change), 3, "")
            for change in (
                lambda s: s + "\n",
                lambda s: s.rstrip("="),
                lambda s: s[:10] + " " + s[10:],
            )
        ]
    )
    envelope, _, table, content = split(good)
    spaced = json.dumps(envelope).encode()
    victim.refuses(joined(spaced.decode(), table, content), 3, "canonical")

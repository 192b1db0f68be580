"""Links and names that lead out of a store or bundle.

Whoever can write there can do worse (SECURITY.md). But nothing is written or
served through a link by mistake.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from attacks_kit import Cli, Victim, said_no
from conftest import Fleet, snapshot

from sdlora_edge.formats.canonical import dump_json, sha256


def moved(path: Path, outside: Path) -> Path:
    """What lies at a path, put outside, and a link in its place."""
    target = outside / path.name
    shutil.move(path, target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize(
    "what",
    [
        "packets/*",
        "packets",
        "generation.0.json",
        "generation.1.json",
        "bundle/model.onnx",
        "bundle/trust.json",
        "apply.lock",
    ],
)
def test_symlinks_in_the_store(victim: Victim, what: str) -> None:
    """Refused by name; what they lead to is neither read as ours, nor written, nor swept away."""
    (path, *_) = sorted(victim.store.glob(what))
    target = moved(path, victim.folder)
    (victim.folder / "bystander").write_text("not ours")
    before = snapshot(victim.folder)
    for command in (
        ("status",),
        ("apply", victim.next),
        ("rollback",),
        ("predict", *victim.images),
    ):
        said_no(victim.cli("device", *command, "--store", victim.store), 3, path.name)
    assert snapshot(victim.folder) == before
    path.unlink()
    shutil.move(target, path)


@pytest.mark.parametrize(
    "what", ["packets/evil", "packets/" + "0" * 64, ".tmp-generation.0.json", "bundle/more"]
)
def test_a_link_that_is_planted_beside(victim: Victim, what: str) -> None:
    """Where the store will write, or clean up: the link is named, its target untouched."""
    target = victim.file(b"not ours", "target")
    (victim.store / what).symlink_to(target)
    said_no(victim.apply(victim.next), 3, Path(what).name)
    assert target.read_bytes() == b"not ours"
    (victim.store / what).unlink()


def test_a_pipe_in_the_store(victim: Victim) -> None:
    """Nothing waits for it."""
    os.mkfifo(victim.store / "packets" / "pipe")
    said_no(victim.apply(victim.next), 3, "pipe")
    (victim.store / "packets" / "pipe").unlink()


def test_a_packet_may_be_named_through_a_link(victim: Victim) -> None:
    """What a user names is read wherever it lies, and kept as a file."""
    link = victim.folder / "link.sdlora"
    link.symlink_to(victim.next)
    assert victim.apply(link).code == 0
    assert not any(path.is_symlink() for path in victim.store.rglob("*"))


def test_a_bundle_with_a_link_to_outside(cli: Cli, fleet: Fleet, tmp_path: Path) -> None:
    """Followed only to the bytes that the manifest names; the store gets a file of its own."""
    shutil.copytree(fleet.bundle, tmp_path / "bundle")
    (tmp_path / "outside").mkdir()
    target = moved(tmp_path / "bundle" / "model.onnx", tmp_path / "outside")
    assert (
        cli("device", "init", "--bundle", tmp_path / "bundle", "--store", tmp_path / "store").code
        == 0
    )
    assert not any(path.is_symlink() for path in (tmp_path / "store").rglob("*"))
    target.write_bytes(b"something else")
    assert cli("device", "status", "--store", tmp_path / "store").code == 0
    said_no(
        cli("device", "init", "--bundle", tmp_path / "bundle", "--store", tmp_path / "other"),
        3,
        "model.onnx",
    )
    assert not (tmp_path / "other").exists()


def test_another_bundle_put_into_a_store(victim: Victim) -> None:
    """An intact bundle of somebody else: a store accepts only the one it was made with."""
    path = victim.store / "bundle" / "manifest.json"
    good = path.read_bytes()
    path.write_bytes(dump_json({**json.loads(good), "model": "another"}))
    for command in (
        ("status",),
        ("apply", victim.next),
        ("rollback",),
        ("predict", *victim.images),
    ):
        said_no(
            victim.cli("device", *command, "--store", victim.store),
            3,
            "not the one this store was made with",
        )
    path.write_bytes(good)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../secret",
        "/etc/hostname",
        "a/../../secret",
        "sub/model.onnx",
        "a\0b",
        "\ud800",
    ],
)
def test_file_names_that_lead_outside(cli: Cli, fleet: Fleet, tmp_path: Path, name: str) -> None:
    """In a bundle's manifest, as a file and as the place of a weight."""
    (tmp_path / "secret").write_bytes(b"secret")
    for number in range(2):
        bundle, store = tmp_path / f"bundle{number}", tmp_path / f"store{number}"
        shutil.copytree(fleet.bundle, bundle)
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        if number:
            next(iter(manifest["weights"].values()))["file"] = name
        else:
            manifest["files"][name] = {
                "sha256": sha256(b"secret"),
                "size": 6,
            }  # what lies at ../secret is as the manifest says
        (bundle / "manifest.json").write_bytes(dump_json(manifest))
        said_no(cli("device", "init", "--bundle", bundle, "--store", store), 3, "")
        assert not store.exists()
        assert not list(tmp_path.glob("store*"))

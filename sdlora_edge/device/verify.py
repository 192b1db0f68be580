"""Everything a store holds, compared with what it should be: for `device verify`, and for monitoring from afar."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..errors import UNWRITTEN, InputError, SdloraError
from ..formats.bundle import MANIFEST, Manifest, open_bundle
from ..formats.canonical import sha256
from ..shortage import noticed
from ..storage import atomic, disk
from .device import Device
from .store import Store

ENGINE = "every file is intact: look for the cause with sdlora-edge device selftest, or flash the device with another bundle"
FLASH, ITSELF = "flash the device again", "the next update writes it anew"
AGAIN = "apply the packet that has this SHA-256 again, or roll back"
KEYS = "apply the packet of keys that has this SHA-256 again: until then no other packet is taken"


def verify(path: Path | str, unproved: bool = False) -> dict[str, Any]:
    """Read every byte of a store, and write nothing in it. unproved: as for `Device.open`. Raises InputError where `path` is no store.

    Returns {"whole": bool, "damage": [{"file", "problem", "remedy"}], "leftovers": [file], "files": how many were compared,
    "bytes": how many, "serves": {"generation", "task"} of the model that can be served in spite of the damage, or None, "untried":
    {"message", "exit_code"} of what kept the model from being tried, or None: that says nothing about the store}.
    """
    store, compared, damage = Store(Path(path)), [], []

    def compare(file: Path, problem: str | None, remedy: str) -> None:
        compared.append(file)
        if problem is not None:
            damage.append(
                {"file": str(file.relative_to(store.path)), "problem": problem, "remedy": remedy}
            )

    records = store.records()
    whole = [record for record in records.values() if record is not None]
    for file, record in records.items():
        compare(file, "missing or damaged" if record is None else None, ITSELF if whole else FLASH)
    for file, problem in _bundle(
        store.path / "bundle", {record.bundle for record in whole}
    ).items():
        compare(file, problem, FLASH)
    keys = {digest for record in store.named() for digest, _ in record.trust}
    for digest in sorted(_needed(store)):
        compare(
            store.path / "packets" / digest,
            _packet(store, digest),
            KEYS if digest in keys else AGAIN,
        )
    leftovers = store.leftovers()
    serves, untried = None, None
    try:
        status = _status(store, unproved)
        serves = {"generation": status["generation"], "task": status["task"]}
        if (
            status["damage"] and not damage
        ):  # every file is what it was, and still not all of it can be served
            damage += [
                {"file": ".", "problem": problem, "remedy": AGAIN} for problem in status["damage"]
            ]
    except UNWRITTEN as error:
        untried = error.to_dict()
    except SdloraError as error:
        if not damage:  # every file is what it was, and still the model cannot be served
            damage.append({"file": ".", "problem": str(error), "remedy": ENGINE})
    return {
        "whole": not damage,
        "damage": damage,
        "leftovers": [str(file.relative_to(store.path)) for file in leftovers],
        "files": len(compared),
        "bytes": sum(disk.size(file) or 0 for file in compared),
        "serves": serves,
        "untried": untried,
    }


def _status(store: Store, unproved: bool) -> dict[str, Any]:
    """Of a device on this store, whose engine has a folder elsewhere."""
    with (
        noticed("while the store was opened"),
        tempfile.TemporaryDirectory(dir=atomic.temporary()) as folder,
    ):
        store.workspace = Path(folder)
        return Device(store, open_bundle(store.path / "bundle"), unproved=unproved).status()


def _bundle(folder: Path, ids: set[str]) -> dict[Path, str | None]:
    """{file: what is wrong with it, or None}. ids: what the records say the bundle is."""
    found: dict[Path, str | None] = {folder / MANIFEST: None}
    try:
        data = atomic.read(folder / MANIFEST)
        manifest = Manifest.from_json(data)
    except InputError as error:
        return {folder / MANIFEST: str(error)}
    if ids and ids != {sha256(data)}:
        return {folder / MANIFEST: "not the one this store was made with"}
    for name, entry in manifest.files.items():
        try:
            same = atomic.sha256_of(folder / name) == (entry["sha256"], entry["size"])
            found[folder / name] = None if same else "not the file the manifest names"
        except InputError as error:
            found[folder / name] = str(error)
    return found


def _needed(store: Store) -> set[str]:
    """What the generation in force consists of; where none is, what any record names."""
    try:
        return set(store.current().digests)
    except InputError:
        return {digest for record in store.named() for digest in record.digests}


def _packet(store: Store, digest: str) -> str | None:
    path = store.path / "packets" / digest
    try:
        store.packet(digest)
    except InputError as error:
        problem = str(error).removeprefix(f"{path}: ")
        return "damaged" if problem.startswith(f"{path} is damaged") else problem
    return None

"""Compares everything a store holds with what it should be, for `device verify`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..errors import UNWRITTEN, InputError, SdloraError
from ..formats.bundle import MANIFEST, Manifest
from ..formats.canonical import sha256
from ..results import Damage, Served, Status, Untried, Verification
from ..shortage import noticed
from ..storage import atomic, disk
from .store import Store

ENGINE = (
    "every file is intact: look for the cause with sdlora-edge device selftest, "
    "or flash the device with another bundle"
)
FLASH, ITSELF = "flash the device again", "the next update writes it anew"
AGAIN = "apply the packet that has this SHA-256 again, or roll back"
KEYS = (
    "apply the packet of keys that has this SHA-256 again: until then no other packet is accepted"
)


class Serving(Protocol):
    """What is asked of a device here."""

    def status(self) -> Status: ...


def verified(store: Store, serving: Callable[[Store], Serving]) -> Verification:
    """Read every byte of a store, and write nothing in it.

    Args:
        store: The store.
        serving: Opens the device on it.

    Raises:
        InputError: It is no store, or its disk does not answer.
    """
    compared = _compared(store)
    damage = [
        Damage(str(file.relative_to(store.path)), problem, remedy)
        for file, problem, remedy in compared
        if problem is not None
    ]
    leftovers = tuple(str(file.relative_to(store.path)) for file in store.leftovers())
    serves, untried = None, None
    try:
        status = _status(store, serving)
        serves = Served(status.generation, status.task)
        if not damage:  # every file is intact, and still not all of the generation can be served
            damage = [Damage(".", problem, AGAIN) for problem in status.damage]
    except UNWRITTEN as error:
        untried = Untried(**error.to_dict())
    except SdloraError as error:
        if not damage:  # every file is intact, and still nothing can be served
            damage = [Damage(".", str(error), ENGINE)]
    return Verification(
        intact=not damage,
        damage=tuple(damage),
        leftovers=leftovers,
        files=len(compared),
        bytes=sum(disk.size(file) or 0 for file, _, _ in compared),
        serves=serves,
        untried=untried,
    )


def _compared(store: Store) -> list[tuple[Path, str | None, str]]:
    """(file, what is wrong with it or None, remedy) for each file that the store needs."""
    records = store.records()
    intact = [record for record in records.values() if record is not None]
    found: list[tuple[Path, str | None, str]] = [
        (file, "missing or damaged" if record is None else None, ITSELF if intact else FLASH)
        for file, record in records.items()
    ]
    problems = _bundle(store.path / "bundle", {record.bundle for record in intact})
    found += [(file, problem, FLASH) for file, problem in problems.items()]
    keys = {digest for record in store.named() for digest, _ in record.trust}
    for digest in sorted(_needed(store)):
        path = store.path / "packets" / digest
        found.append((path, _packet(store, digest), KEYS if digest in keys else AGAIN))
    return found


def _status(store: Store, serving: Callable[[Store], Serving]) -> Status:
    """The status of a device on this store. Its engine works elsewhere: nothing is written here."""
    with (
        noticed("while the store was opened"),
        tempfile.TemporaryDirectory(dir=atomic.temporary()) as folder,
    ):
        store.workspace = Path(folder)
        return serving(store).status()


def _bundle(folder: Path, ids: set[str]) -> dict[Path, str | None]:
    """{file: what is wrong with it, or None}. ids: the bundle's id, as the records say it."""
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
    """The packets of the generation in force; if there is none, those that any record names."""
    try:
        return set(store.current().digests)
    except InputError:
        return {digest for record in store.named() for digest in record.digests}


def _packet(store: Store, digest: str) -> str | None:
    """What is wrong with a packet of the store, or None."""
    path = store.path / "packets" / digest
    try:
        store.packet(digest)
    except InputError as error:
        problem = str(error).removeprefix(f"{path}: ")
        return "damaged" if problem.startswith(f"{path} is damaged") else problem
    return None

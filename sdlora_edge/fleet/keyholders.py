"""The folder of a fleet's keys. It lies apart from the repository, which the world can read.

KEYS/root.json       the first root: what devices and publishers trust from the beginning
KEYS/offline/        root*.key, targets*.key, with their .pub files
KEYS/online/         snapshot*.key, timestamp*.key, rollout*.key
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from ..formats.signing import load_public, load_signer, new_key
from ..storage import atomic
from .founding import RoleKeys, Setup
from .online import OnlineKeys
from .roles import LARGEST, OFFLINE, ROLES

if TYPE_CHECKING:
    from securesystemslib.signer import Key


@dataclass(frozen=True)
class Choices:
    """How many keys a new repository has.

    Attributes:
        counts: Number of keys of a role; 1 if it is not named.
        threshold: Keys of root, and of targets, that must sign.
        days: Days until the metadata of a role expires, where it differs from `roles.DAYS`.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    threshold: int = 1
    days: Mapping[str, int] = field(default_factory=dict)


class KeyFolder:
    """Where the keys are."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.offline, self.online = self.path / "offline", self.path / "online"

    def prepare(self, choices: Choices, passphrase: bytes | None = None) -> Setup:
        """Make the keys of a new repository.

        Args:
            choices: How many.
            passphrase: Encrypts the offline keys.

        Raises:
            UsageError: A key exists, or a threshold cannot be met.
        """
        counts = {role: choices.counts.get(role, 1) for role in ROLES}
        for role in OFFLINE:
            if not 1 <= choices.threshold <= counts[role]:
                raise UsageError(
                    f"a threshold of {choices.threshold} with {counts[role]} key(s) of the role "
                    f"{role}: make more keys, or choose a lower threshold"
                )
        keys: dict[str, RoleKeys] = {}
        signers: list[Path] = []
        for role, count in counts.items():
            offline = role in OFFLINE
            made = self.make(role, count, passphrase if offline else None)
            public = [load_public(file.with_suffix(".pub")) for file in made]
            keys[role] = RoleKeys(public, choices.threshold if offline else 1)
            signers += made if offline else []
        known = [partial(load_signer, file, lambda _: passphrase or b"") for file in signers]
        return Setup(keys, known, OnlineKeys.load(self.online), choices.days)

    def make(self, role: str, count: int, passphrase: bytes | None = None) -> list[Path]:
        """Write new key pairs of a role. Returns the private files."""
        folder = self.offline if role in OFFLINE else self.online
        found: list[Path] = []
        number = 1
        while len(found) < count:
            name = role if number == 1 and count == 1 else f"{role}-{number}"
            if not (folder / f"{name}.key").exists() and not (folder / f"{name}.pub").exists():
                found.append(new_key(name, folder, passphrase)[0])
            number += 1
        return found

    def files(self, keyids: Collection[str]) -> list[Path]:
        """The private files of some keys, as the .pub files beside them say."""
        return [
            file
            for folder in (self.offline, self.online, self.path)
            if folder.is_dir()
            for file in sorted(folder.glob("*.key"))
            if file.with_suffix(".pub").is_file()
            and load_public(file.with_suffix(".pub")).keyid in keyids
        ]

    def pinned(self) -> bytes | None:
        """The first root; None if it was not kept here."""
        path = self.path / "root.json"
        return atomic.read(path, LARGEST) if path.is_file() else None

    def pin(self, root: bytes) -> None:
        """Keep the first root."""
        atomic.write(self.path / "root.json", root)

    def online_keys(self) -> OnlineKeys | None:
        """The online keys; None if they are not here."""
        return OnlineKeys.load(self.online) if any(self.online.glob("*.key")) else None


def chosen_keys(keyids: Sequence[str], names: Sequence[str]) -> list[str]:
    """The ids of the keys that a user names by a .pub file or by the first digits of an id.

    Raises:
        InputError: A name fits no key, or several.
    """
    found = []
    for name in names:
        path = Path(name)
        wanted = load_public(path).keyid if path.is_file() else name
        fitting = [keyid for keyid in keyids if keyid.startswith(wanted)]
        if len(fitting) != 1 or len(wanted) < 4:
            raise InputError(
                f"{name!r} names {len(fitting)} keys of the role: give the .pub file, or the first "
                "12 digits that sdlora-edge fleet status shows"
            )
        found += fitting
    return found


def public_keys(names: Sequence[str]) -> list[Key]:
    """The keys of .pub files."""
    return [load_public(Path(name)) for name in names]

"""The keys that sign without a person: of the roles snapshot, timestamp and rollout.

They lie on the machine that refreshes and paces. Whoever steals them can delay packets and change
waves, and can neither publish a packet nor sign one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, TrustError
from ..formats.signing import load_signer

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner


@dataclass(frozen=True)
class OnlineKeys:
    """Private keys by their ids."""

    folder: Path
    signers: Mapping[str, CryptoSigner]

    @classmethod
    def load(cls, folder: Path | str) -> OnlineKeys:
        """Read every `.key` file of a folder.

        Raises:
            InputError: There is none.
        """
        folder = Path(folder)
        files = sorted(folder.glob("*.key")) if folder.is_dir() else []
        if not files:
            raise InputError(f"{folder} holds no key: name the folder of the online keys")
        loaded = [load_signer(file) for file in files]
        return cls(folder, {signer.public_key.keyid: signer for signer in loaded})

    def of(self, role: str, keyids: Collection[str]) -> list[CryptoSigner]:
        """The keys that sign for a role.

        keyids: Of the role.

        Raises:
            TrustError: None of them is here.
        """
        if found := [signer for keyid, signer in self.signers.items() if keyid in keyids]:
            return found
        raise TrustError(
            f"{self.folder} holds no key of the role {role}: put it there, or replace it with "
            f"sdlora-edge fleet rotate {role}"
        )

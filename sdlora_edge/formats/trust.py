"""The keys that a device trusts, and how a public key is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from securesystemslib.signer import Key, SSlibKey

from ..errors import InputError
from . import ed25519
from .canonical import dump_json, is_sha256, sha256
from .limits import LIMITS, natural


@dataclass(frozen=True)
class Trust:
    """The keys that a device trusts.

    Attributes:
        threshold: How many of them must have signed.
        version: Each change of keys has a higher one.
    """

    keys: tuple[Key, ...]
    threshold: int
    version: int = 1

    def __post_init__(self) -> None:
        _require_few(len(self.keys))
        if not 1 <= self.threshold <= max(1, len(self.keys)):
            raise InputError(
                f"trust: a threshold of {self.threshold} cannot be met by {len(self.keys)} keys"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return trust.json."""
        return {
            "version": self.version,
            "threshold": self.threshold,
            "keys": {key.keyid: key.to_dict() for key in self.keys},
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Trust:
        """Read trust.json.

        Raises:
            InputError: A key is not Ed25519, or is not named by its own digest (so no key counts
                twice); or a field is missing, unknown or out of bounds.
        """
        try:
            _require_few(len(value["keys"]))  # first: checking a key takes milliseconds
            keys = tuple(public_key(keyid, entry) for keyid, entry in value["keys"].items())
            if unknown := set(value) - {"keys", "threshold", "version"}:
                raise ValueError(f"unknown fields {sorted(unknown)}")
            threshold = natural(value["threshold"], LIMITS.keys)
            version = natural(value["version"], LIMITS.revision)
            if version < 1:
                raise ValueError("version 0")
            return cls(keys, threshold, version)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"trust.json does not hold keys and a threshold: {error!r}") from error


def _require_few(count: int) -> None:
    if count > LIMITS.keys:
        raise InputError(f"{count} keys are trusted, more than {LIMITS.keys}: name fewer")


def public_key(keyid: str, entry: dict[str, Any]) -> Key:
    """Read a public key: the one place that does.

    Raises:
        InputError: It is not the one form of a sound Ed25519 key.
    """
    short, public = keyid[:12], entry["keyval"]["public"]
    if (entry["keytype"], entry["scheme"]) != ("ed25519", "ed25519"):
        raise InputError(
            f"key {short}: {entry['keytype']}/{entry['scheme']} is not Ed25519: make one with "
            "sdlora-edge keys new"
        )
    if not is_sha256(public):
        raise InputError(f"key {short}: an Ed25519 public key is 64 hexadecimal digits, lower case")
    key = SSlibKey(keyid, "ed25519", "ed25519", {"public": public})
    if entry != key.to_dict():
        raise InputError(
            f"key {short}: it has more fields than keytype, scheme and keyval.public: remove them"
        )
    if keyid != key_name(key):
        raise InputError(f"key {short}: its name is not the digest of the key")
    if not ed25519.is_key(bytes.fromhex(public)):
        raise InputError(
            f"key {short}: {public} is not a sound Ed25519 key: signatures for it can be made "
            "without a private key; make another with sdlora-edge keys new"
        )
    return key


def key_name(key: Key) -> str:
    """Return the name of a key: the digest of its public half."""
    return sha256(
        dump_json({"keytype": key.keytype, "scheme": key.scheme, "public": key.keyval["public"]})
    )

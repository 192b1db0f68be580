"""Signatures that no honest program makes, and on which verifiers of Ed25519 differ."""

from __future__ import annotations

import base64
import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sdlora_edge.formats.signing import PAYLOAD_TYPE

PRIME = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493


def seed(name: str) -> bytes:
    """The private key of this name."""
    return hashlib.sha256(f"sdlora-edge vectors key {name}".encode()).digest()


def public(name: str) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed(name)).public_key().public_bytes_raw()


def mirrored(point: bytes) -> bytes:
    """The same point plus the one of order 2: both coordinates change their signs."""
    n = int.from_bytes(point, "little")
    return (PRIME - n % 2**255 | (1 - (n >> 255)) << 255).to_bytes(32, "little")


def scalar(name: str) -> int:
    n = int.from_bytes(hashlib.sha512(seed(name)).digest()[:32], "little")
    return n & (2**254 - 8) | 2**254


def pae(payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    """What is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def signature(payload: bytes, name: str, R: bytes, r: int, key: bytes | None = None) -> str:
    """By the key of this name, written as `key`, with the nonce r, written as R; base64."""
    return base64.b64encode(
        R
        + ((r + _h(payload, R, key or public(name)) * scalar(name)) % ORDER).to_bytes(32, "little")
    ).decode()


def of_mixed_order(payload: bytes, name: str) -> str:
    """A signature that the mirrored key verifies: the point of order 2 counts an even number."""
    key = mirrored(public(name))
    nonce = next(n for n in map(str, range(64)) if _h(payload, public(n), key) % 2 == 0)
    return signature(payload, name, public(nonce), scalar(nonce), key)


def _h(payload: bytes, R: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.sha512(R + key + pae(payload)).digest(), "little") % ORDER

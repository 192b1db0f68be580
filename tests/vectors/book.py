"""What vectors are written with: keys, packets, and the book of what a device must say to them."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from curve import pae, seed
from forge import Draft, joined, split
from network import Chain, Export

from sdlora_edge.formats import control, packet, signing
from sdlora_edge.formats.canonical import dump_json
from sdlora_edge.formats.control import Revoked
from sdlora_edge.formats.signing import PAYLOAD_TYPE, Trust
from sdlora_edge.storage import atomic


def signer(name: str) -> Any:
    """A key that everybody knows: its private half is the SHA-256 of a text."""
    private = Ed25519PrivateKey.from_private_bytes(seed(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "private.key"
        atomic.write(
            path,
            private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            mode=0o600,
        )
        return signing.load_signer(path)


KEYS = {name: signer(name) for name in "abcd"}


def by(names: str) -> Callable[[bytes], bytes]:
    return lambda payload: signing.sign(payload, [KEYS[name] for name in names])


def trust(names: str, threshold: int = 1, version: int = 1) -> Trust:
    return Trust(tuple(KEYS[name].public_key for name in names), threshold, version)


@dataclass(frozen=True)
class Canary:
    """A packet's canary.

    seed: else the task's number. count: images. off: how wrong the logits are, as a share of the
    largest.
    """

    seed: int | None = None
    count: int = 2
    off: float = 0.0


def update(
    chain: Chain,
    names: str = "a",
    tasks: int = 1,
    revision: int | Sequence[int] = 0,
    canary: Canary = Canary(),
) -> bytes:
    """The packet of a chain's last tasks."""
    t = chain.state.task
    seed = t if canary.seed is None else canary.seed
    logits = chain.logits(seed, canary.count)
    logits[0, 0] += np.float32(canary.off * max(1, np.abs(logits).max()))
    revisions = [revision] * tasks if isinstance(revision, int) else list(revision)
    updates, before = chain.updates[t - tasks :], chain.states[t - tasks]
    sign, encoding = by(names), chain.encoding
    contents = packet.Contents(
        lineage=chain.lineage,
        begin=before.digest,
        updates=tuple(updates),
        canary_seed=seed,
        canary_logits=logits,
        encoding=encoding,
        revisions=tuple(revisions),
    )
    return packet.build(contents, sign)


def revocation(chain: Chain, task: int, revision: int, names: str = "a") -> bytes:
    return control.build_revocation(chain.lineage, Revoked(task, revision), by(names))


@dataclass
class Vector:
    """A device's life. `state`: what it is in now."""

    name: str
    about: str
    bundle: str
    state: Chain
    book: Book
    trust_version: int = 1
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        name: str,
        outcome: Chain | int,
        data: bytes | None = None,
        trust_version: int | None = None,
    ) -> None:
        """The next packet; `data` if it is new. outcome: the exit code, or the state after it."""
        if data is not None:
            assert self.book.packets.setdefault(name, data) == data, name
        self._add({"packet": name}, outcome, trust_version)

    def rollback(self, outcome: Chain) -> None:
        self._add({"rollback": True}, outcome, None)

    def _add(self, step: dict[str, Any], outcome: Chain | int, trust_version: int | None) -> None:
        if isinstance(outcome, Chain):
            self.state, self.trust_version = outcome, trust_version or self.trust_version
        code = outcome if isinstance(outcome, int) else 0
        digest = self.state.state.digest
        self.book.states.setdefault(
            digest, self.state.expected(self.book.exports[self.bundle].dtype)
        )
        self.steps.append(
            {**step, "exit": code, "state": digest, "trust_version": self.trust_version}
        )


@dataclass
class Book:
    exports: dict[str, Export]
    packets: dict[str, bytes] = field(default_factory=dict)
    vectors: list[Vector] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)

    def vector(self, name: str, bundle: str, about: str) -> Vector:
        self.vectors.append(Vector(name, about, bundle, self.exports[bundle].chain, self))
        return self.vectors[-1]


# Packets with something wrong


def draft(data: bytes, change: Callable[[Draft], object], names: str = "a", **sealed: Any) -> bytes:
    """The same packet, changed and signed again."""
    changed = Draft(data)
    change(changed)
    return changed.sealed(*(KEYS[name] for name in names), **sealed)


def signed(payload: bytes, name: str, kind: str = PAYLOAD_TYPE) -> dict[str, str]:
    """An entry of `signatures`."""
    key = KEYS.get(name) or signer(name)
    sig = bytes.fromhex(key.sign(pae(payload, kind)).signature)
    return {"keyid": key.public_key.keyid, "sig": base64.b64encode(sig).decode()}


def enveloped(
    payload: bytes, signatures: Sequence[dict[str, Any]], kind: str = PAYLOAD_TYPE
) -> dict[str, Any]:
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": list(signatures),
    }


def flipped(signature: dict[str, str]) -> dict[str, str]:
    """A bit of the signature's first half."""
    sig = bytearray(base64.b64decode(signature["sig"]))
    sig[5] ^= 1
    return {**signature, "sig": base64.b64encode(sig).decode()}


def resigned(data: bytes, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> bytes:
    """The same packet with other signatures."""
    envelope, _, table, content = split(data)
    return joined(
        dump_json({**envelope, "signatures": change(envelope["signatures"])}).decode(),
        table,
        content,
    )


def damaged(data: bytes, name: str) -> bytes:
    """The signature of one key is wrong."""
    keyid = KEYS[name].public_key.keyid
    return resigned(
        data, lambda signatures: [flipped(s) if s["keyid"] == keyid else s for s in signatures]
    )

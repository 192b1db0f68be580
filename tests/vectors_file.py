"""Section 1 of docs/packet.md, from that page alone: a packet's bytes, its signatures, its tensors.

Part of `vectors_reader`, which says more.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
FORMAT = "sdlora-edge/packet/3"
TYPE = "application/vnd.sdlora-edge.packet+json"
DTYPES = {"F32": "<f4", "I32": "<i4", "F16": "<f2", "I8": "|i1", "U8": "|u1"}
ORDER = 2**252 + 27742317777372353535851937790883648493
PRIME = 2**255 - 19
D = -121665 * pow(121666, -1, PRIME) % PRIME
"""of the curve -x^2 + y^2 = 1 + D x^2 y^2"""
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
"""what Python raises while it reads what is not there, or of another kind: exit code 3"""


class Refused(Exception):
    """A packet that is not applied."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def need(right: Any, code: int = 3) -> None:
    """Refuse the packet unless this holds."""
    if not right:
        raise Refused(code)


def plain(value: Any) -> bytes:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parsed(text: bytes) -> Json:
    value: Json = json.loads(
        text,
        object_pairs_hook=unique,
        parse_constant=no_number,
        parse_float=no_number,
        parse_int=exact,
    )
    need(isinstance(value, dict) and depth(value) <= 16)
    return value


def unique(pairs: list[tuple[str, Any]]) -> Json:
    need(len(dict(pairs)) == len(pairs))
    return dict(pairs)


def no_number(text: str) -> None:
    raise Refused(3)


def exact(text: str) -> int:
    need(abs(int(text)) < 2**53)
    return int(text)


def depth(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max((depth(x) for x in inside if isinstance(x, (dict, list))), default=0)


def sha(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def is_hex(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def whole(value: Any, most: int = 1_000_000) -> int:
    need(type(value) is int and 0 <= value <= most)
    return int(value)


def unbase64(text: str) -> bytes:
    data = base64.b64decode(text)
    need(base64.b64encode(data).decode() == text)
    return data


def opened(data: bytes, trust: Json) -> tuple[Json, Arrays, bytes]:
    """(manifest, tensors, envelope)."""
    need(len(data) <= 64 << 20)
    n = int.from_bytes(data[:8], "little")
    need(n <= 1 << 20 and 8 + n <= len(data))
    table, content = parsed(data[8 : 8 + n]), data[8 + n :]
    text = plain(table)
    need(data[8 : 8 + n] == text + b" " * (-len(text) % 8))
    about = table.pop("__metadata__")
    need(set(about) == {"envelope", "format"} and about["format"] == FORMAT)
    envelope = about["envelope"].encode("ascii")
    manifest = parsed(verified(envelope, trust))
    need(manifest["format"] == FORMAT)
    need(manifest["content"] == sha(plain(table), content))
    return manifest, tensors(table, content), envelope


def verified(text: bytes, trust: Json) -> bytes:
    """The manifest's bytes."""
    envelope = parsed(text)
    need(text == plain(envelope))
    need(set(envelope) == {"payload", "payloadType", "signatures"})
    payload, signatures = unbase64(envelope["payload"]), envelope["signatures"]
    need(1 <= len(signatures) <= 16)
    need(len({signature["keyid"] for signature in signatures}) == len(signatures))
    kind = TYPE.encode()
    signed, good = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload), 0
    for signature in signatures:
        need(set(signature) == {"keyid", "sig"} and is_hex(signature["keyid"]))
        sig, key = unbase64(signature["sig"]), trust["keys"].get(signature["keyid"])
        need(len(sig) == 64)
        need(int.from_bytes(sig[32:], "little") < ORDER)
        good += key is not None and has_signed(key["keyval"]["public"], sig, signed)
    need(envelope["payloadType"] == TYPE, 4)
    need(good >= trust["threshold"], 4)
    return payload


def has_signed(public: str, sig: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(sig, signed)
    except InvalidSignature:
        return False
    return True


def is_sound(public: str) -> bool:
    """Whether these are the canonical bytes of a point of the group's order."""
    y = int.from_bytes(bytes.fromhex(public), "little") % 2**255
    square = (y * y - 1) * pow(D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    neutral = (0, 1, 1)
    found = neutral
    for bit in f"{ORDER:b}":
        found = plus(found, found)
        found = plus(found, (x, y, 1)) if bit == "1" else found
    ends = found[0] == 0 and found[1] == found[2]
    return y < PRIME and x * x % PRIME == square and x != 0 and ends


def plus(p: tuple[int, int, int], q: tuple[int, int, int]) -> tuple[int, int, int]:
    """The sum of two points of the curve, each (x z, y z, z)."""
    a, c, e = p[2] * q[2], p[0] * q[0], p[1] * q[1]
    f, g = a * a - D * c * e, a * a + D * c * e
    x, y = a * f * ((p[0] + p[1]) * (q[0] + q[1]) - c - e), a * g * (c + e)
    return x % PRIME, y % PRIME, f * g % PRIME


def tensors(table: Json, content: bytes) -> Arrays:
    dtypes = {name: np.dtype(DTYPES[entry["dtype"]]) for name, entry in table.items()}
    found, end = {}, 0
    for name in sorted(table, key=lambda name: (-dtypes[name].itemsize, name)):
        (begin, stop), shape = table[name]["data_offsets"], table[name]["shape"]
        need(begin == end and type(begin) is type(stop) is int)
        need(len(shape) <= 2 and all(0 <= side <= 2**26 for side in shape))
        found[name] = np.frombuffer(content[begin:stop], dtypes[name]).reshape(shape)
        end = stop
    need(end == len(content))
    return found


def tensors_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Section 4."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = arrays[name]
        digest.update(plain([name, x.dtype.name, list(x.shape)]) + x.tobytes())
    return digest.hexdigest()

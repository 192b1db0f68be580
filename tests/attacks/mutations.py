"""How the fuzzer changes packets: their bytes, their header, or what is signed in them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from forge import DTYPES, Draft, framed, joined, split

from sdlora_edge.errors import SdloraError

Signers = Sequence[Any]


def deep(levels: int) -> Any:
    """[[[...]]]"""
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 127, 2**31, 2**63, -(2**63), 10**400, 10**4000, 0.0, -0.0, 0.5, 1.0, 1e300, 1e-320,
    float("nan"), float("inf"), "", " ", "a", "a/b", "..", "../../x", "a\\b", "a\0", "\x1b[31m", "\x9b", "\ud800", "e\u0301", "\u202e",
    "x" * 300, "0" * 64, "f" * 64, "F32", "F64", "fp16", "int8", "update", "trust", "revocation", [], {}, [[]], [0, 0], [1, 2, 3], {"a": 1},
    [1e4], [0.0, 1.0], [[1.0]], [0] * 2000, deep(50), deep(600), deep(980),
)  # fmt: skip
NUMBERS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-8,
    6e4,
    1e4,
    9999.0,
    1.0001e4,
    1e30,
    3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
TEXTS: tuple[Callable[[bytes], bytes], ...] = (
    lambda t: t[:-1] + b',"kind":"update"}',
    lambda t: t.replace(b":0", b":NaN", 1),
    lambda t: t.replace(b":1", b":1e400", 1),
    lambda t: t.replace(b":1", b":" + b"9" * 5000, 1),
    lambda t: t.replace(b":1", b":" + b"9" * 5000 + b".0", 1),
    lambda t: t.replace(b":", b": ", 1),
    lambda t: t.replace(b'"', b"'", 2),
    lambda t: b"\xef\xbb\xbf" + t,
    lambda t: t + b"\0",
    lambda t: t + t,
    lambda t: b"[" * 5000 + t,
    lambda t: b'{"a":' * 5000 + t,
    lambda t: t.decode().encode("utf-16"),
    lambda t: t.replace(b"a", b"\xff", 1),
    lambda t: b"",
    lambda t: b"null",
)


def mutate(
    chance: random.Random, packet: bytes, others: Sequence[bytes], signers: Signers
) -> tuple[bytes, bytes | None]:
    """(a changed packet, what was signed in it or None)."""
    way = chance.random()
    if way < 0.25:
        return _bytes(chance, packet, others), None
    try:
        return (
            (_header(chance, packet), None)
            if way < 0.4
            else _signed(chance, packet, others, signers)
        )
    except (
        SdloraError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ):
        return _bytes(
            chance, packet, others
        ), None  # it had been changed beyond what can be taken apart


def _bytes(chance: random.Random, packet: bytes, others: Sequence[bytes]) -> bytes:
    data = bytearray(packet)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(len(data) + 1)
        way = chance.randrange(8)
        if way < 3 and data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif way == 3:
            del data[place:]
        elif way == 4:
            data += chance.randbytes(chance.choice((1, 7, 8, 4096)))
        elif way == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            data[place : place + chance.choice((0, 64))] = other[
                start : start + chance.choice((1, 8, 64, 4096))
            ]
        elif way == 6:
            data[place : place + chance.choice((0, 1, 8))] = chance.randbytes(chance.choice((1, 8)))
        else:
            data[:8] = struct.pack(
                "<Q",
                chance.choice(
                    (
                        0,
                        1,
                        7,
                        2**20,
                        2**20 + 1,
                        2**32,
                        2**63,
                        2**64 - 1,
                        max(0, len(data) - 8),
                        place,
                    )
                ),
            )
    return bytes(data)


def _header(chance: random.Random, packet: bytes) -> bytes:
    """Its tensor table, metadata or envelope changed, without the keys."""
    envelope, _, table, content = split(packet)
    way = chance.randrange(4)
    if way == 0:
        table = edited(chance, table)
        return joined(_dump(envelope).decode(), table, content)
    if way == 1:
        return joined(_dump(edited(chance, envelope)).decode(), table, content)
    if way == 2:
        return joined(
            _dump(envelope).decode(),
            table,
            content,
            {chance.choice(("format", "envelope", "more")): chance.choice(VALUES)},
        )
    (length,) = struct.unpack("<Q", packet[:8])
    return framed(chance.choice(TEXTS)(packet[8 : 8 + length].rstrip()), content)


def _signed(
    chance: random.Random, packet: bytes, others: Sequence[bytes], signers: Signers
) -> tuple[bytes, bytes]:
    """What the keys have signed, changed and signed again."""
    draft = Draft(packet)
    if chance.random() < 0.1:
        draft.arrays |= Draft(chance.choice(others)).arrays
    if chance.random() < 0.6:
        draft.manifest = edited(chance, draft.manifest)
    for _ in range(chance.choice((0, 0, 1, 1, 2))):
        _array(chance, draft.arrays)
    made: list[bytes] = []

    def payload(text: bytes) -> bytes:
        made.append(chance.choice(TEXTS)(text) if chance.random() < 0.1 else text)
        return made[-1]

    def table(entries: dict[str, Any]) -> None:
        if chance.random() < 0.15:
            changed = edited(chance, entries)
            entries.clear()
            entries.update(changed)

    chosen = (
        signers
        if chance.random() < 0.9
        else chance.sample(list(signers), chance.randrange(len(signers)))
    )
    sealed = draft.sealed(*chosen, table=table, payload=payload, leads=chance.random() < 0.9)
    return sealed, made[-1]


def _array(chance: random.Random, arrays: dict[str, np.ndarray]) -> None:
    if not arrays:
        return
    name = chance.choice(sorted(arrays))
    array = arrays[name]
    way = chance.randrange(8)
    if way == 0:
        del arrays[name]
    elif way == 1:
        arrays[chance.choice(sorted(arrays)) + chance.choice(("", ".A", ".B", ".scale", "x"))] = (
            array
        )
    elif way == 2:
        arrays[chance.choice(("1", "2", "3", "x", "", "..")) + "." + name.partition(".")[2]] = (
            arrays.pop(name)
        )
    elif way == 3:
        arrays[name] = np.frombuffer(
            array.tobytes()[: array.nbytes // 8 * 8], DTYPES[chance.choice(sorted(DTYPES))]
        )
    elif way == 4:
        arrays[name] = array.reshape(
            chance.choice([(-1,), (1, -1), (-1, 1), (array.size, 1), (1, array.size)])
        )
    elif way == 5:
        arrays[name] = array[: chance.randrange(len(array) + 1)] if array.ndim else array
    elif way == 6 and array.size:
        with np.errstate(all="ignore"):
            array.flat[chance.randrange(array.size)] = np.array(chance.choice(NUMBERS)).astype(
                array.dtype
            )
    else:
        arrays[name] = np.frombuffer(chance.randbytes(array.nbytes), array.dtype).reshape(
            array.shape
        )


def edited(chance: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """Replace, remove, move or double one or two values of a JSON object, at any depth."""
    value = _copy(value)
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            break
        parent, key = chance.choice(places)
        way = chance.randrange(6)
        if way == 0:
            del parent[key]
        elif way == 1:
            other, name = chance.choice(places)
            parent[key] = _copy(other[name])
        elif way == 2 and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif way == 2:
            parent[chance.choice(("x", "..", "", "__metadata__", "1.x.A", key + " "))] = parent[key]
        elif way == 3 and type(parent[key]) in (int, float):
            parent[key] = chance.choice(
                (
                    parent[key] + 1,
                    parent[key] - 1,
                    -parent[key],
                    parent[key] * 2,
                    float(parent[key]),
                )
            )
        elif way == 4 and isinstance(parent[key], str):
            parent[key] = parent[key][: chance.randrange(len(parent[key]) + 1)]
        else:
            parent[key] = _copy(chance.choice(VALUES))
    return value


def _places(value: Any) -> Any:
    """(container, key) of every value in a tree."""
    found = [value]
    for node in found:
        entries = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(entries)[:400]:
            yield node, key
            if isinstance(child, (dict, list)):
                found.append(child)


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

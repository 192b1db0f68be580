"""One byte string for one value: canonical JSON, and the digests taken over it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError

DIGITS = 16
"""of a whole number: none of ours has more than 2^53, and the longest that Python reads take a second to print"""
DEPTH = 16
"""of objects and lists in one another: ours need 6, and what is deeper could exhaust the stack of whoever prints it"""


def dump_json(value: Any) -> bytes:
    """Canonical JSON: ASCII, no white space, keys sorted, finite numbers only (ValueError otherwise)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate key, no NaN or infinity, at most DEPTH levels, whole numbers of at most
    DIGITS digits.

    Raises InputError, naming `what`, for anything else.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_float=_finite,
            parse_int=_short,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object")
    if _deeper(value, DEPTH):
        raise InputError(f"{what} has more than {DEPTH} levels")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists lie more than so many levels in one another. One level after the other: no recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            c
            for v in level
            for c in (v.values() if isinstance(v, dict) else v)
            if isinstance(c, (dict, list))
        ]
        if not level:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value


def _short(text: str) -> int:
    if len(text) > DIGITS + text.startswith("-"):
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def sha256(*chunks: bytes) -> str:
    """Hexadecimal SHA-256 of the concatenated chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def is_sha256(value: Any) -> bool:
    """64 hexadecimal digits, lower case."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and little-endian bytes, so equal arrays give one digest anywhere."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(dump_json([name, array.dtype.name, list(array.shape)]))
        digest.update(little.tobytes())
    return digest.hexdigest()

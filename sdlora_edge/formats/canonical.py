"""Canonical JSON, where one value has one byte string, and the digests taken over it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import InputError

UNIT = 2.0**-24
"""In JSON a fraction is an integer in this unit. Magnitudes are multiples of it, so their sums are
exact in float64: no drift over any number of packets."""
LARGEST = 2**53 - 1
"""The largest integer in exact JSON: JavaScript reads those above it as others."""
DIGITS = 16
"""Digits of an integer. LARGEST has 16, and Python takes a second to print the longest it reads."""
DEPTH = 16
"""Levels of objects and lists. Ours need 6. Deeper ones could exhaust the stack of a program that
prints them."""


def dump_json(value: Any) -> bytes:
    """Write canonical JSON: ASCII, no white space, sorted keys. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no key twice, finite numbers, bounded depth and digits.

    Raises:
        InputError: `data` is anything else. The message begins with `what`.
    """
    return _parsed(data, what, _finite, _short)


def parse_exact_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object whose every number is an integer from -LARGEST to LARGEST.

    For files that are signed or hashed. Languages write floats in different ways: JavaScript's
    `JSON.stringify` differs from Python on 29 % of values. All of them agree on integers.

    Raises:
        InputError: `data` is anything else. The message begins with `what`.
    """
    return _parsed(data, what, _no_float, _exact)


def _parsed(
    data: bytes, what: str, parse_float: Callable[[str], float], parse_int: Callable[[str], int]
) -> dict[str, Any]:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_float=parse_float,
            parse_int=parse_int,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object")
    if _deeper(value, DEPTH):
        raise InputError(f"{what} has more than {DEPTH} levels")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Tell whether objects and lists are nested deeper than `levels`, without recursion."""
    level = [value]
    for _ in range(levels):
        inner = [c for v in level for c in (v.values() if isinstance(v, dict) else v)]
        level = [c for c in inner if isinstance(c, (dict, list))]
        if not level:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value


def _no_float(text: str) -> float:
    raise ValueError(f"{text[:DIGITS]} is not an integer")


def _short(text: str) -> int:
    if len(text) > DIGITS + text.startswith("-"):
        raise ValueError(f"an integer has {len(text)} digits, more than {DIGITS}")
    return int(text)


def _exact(text: str) -> int:
    if abs(value := _short(text)) > LARGEST:
        raise ValueError(f"{text} is out of range: integers go from -{LARGEST} to {LARGEST}")
    return value


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def to_units(values: np.ndarray) -> Any:
    """Write fractions as integers in UNIT: a list, nested like the array.

    Args:
        values: float64, multiples of UNIT.

    Raises:
        ValueError: A value is not a multiple of UNIT, or not finite.
    """
    scaled = np.asarray(values, np.float64) / UNIT  # exact: a division by a power of two
    if not (np.rint(scaled) == scaled).all() or not (np.abs(scaled) <= LARGEST).all():
        raise ValueError(f"not all multiples of 2^-24: {np.asarray(values).ravel()[:4]}")
    return scaled.astype(np.int64).tolist()


def sha256(*chunks: bytes) -> str:
    """Return the SHA-256 of the concatenated chunks as lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def is_sha256(value: Any) -> bool:
    """Tell whether `value` is a string of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def tensors_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names (sorted), dtypes, shapes and little-endian bytes.

    Equal arrays give one digest on every machine.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(dump_json([name, array.dtype.name, list(array.shape)]))
        digest.update(little.reshape(-1).data)
    return digest.hexdigest()

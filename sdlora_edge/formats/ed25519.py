"""Which 32 bytes are an Ed25519 public key, and which begin a signature: RFC 8032, strictly.

securesystemslib verifies with `cryptography` if that is installed, and in Python if not. The two
agree on every signature that has a canonical R and a key of the group's own order. On others they
differ, or worse: for a key of small order, 64 constant bytes are a signature of every message, made
without a private key. Pure Python.
"""

from __future__ import annotations

from functools import lru_cache

ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of the group of signatures, L in RFC 8032. The whole curve has eight times as many points."""
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_Point = tuple[int, int, int, int]
"""(X, Y, Z, T): x = X / Z, y = Y / Z, x y = T / Z"""


def is_canonical(encoded: bytes) -> bool:
    """Tell whether this is the canonical encoding of a point.

    That is: y is below the prime, and the sign of x = 0 is not negative.
    """
    number = int.from_bytes(encoded, "little")
    y = number % 2**255
    return y < _P and (number == y or y not in (1, _P - 1))


@lru_cache(maxsize=256)  # a key takes 2 ms, and a device reads the same few keys repeatedly
def is_key(encoded: bytes) -> bool:
    """Tell whether these are the canonical bytes of a point of order L.

    Such a point is on the curve, and of neither small order nor mixed order.
    """
    if len(encoded) != 32 or not is_canonical(encoded):
        return False
    y = int.from_bytes(encoded, "little") % 2**255
    # The sign of x does not matter: both points have the same order.
    x = _root((y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P)
    if x is None or y == 1:
        return False
    end = _times(ORDER, (x, y, 1, x * y % _P))
    return end[0] == 0 and end[1] == end[2]


def _root(square: int) -> int | None:
    root = pow(square, (_P + 3) // 8, _P)
    for candidate in (root, root * pow(2, (_P - 1) // 4, _P) % _P):
        if candidate * candidate % _P == square:
            return candidate
    return None


def _times(scalar: int, point: _Point) -> _Point:
    result = (0, 1, 1, 0)
    for bit in f"{scalar:b}":
        result = _add(result, result)
        if bit == "1":
            result = _add(result, point)
    return result


def _add(p: _Point, q: _Point) -> _Point:
    """Add points (RFC 8032, 5.1.4). The formula is complete: it has no special case."""
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % _P, (p[1] + p[0]) * (q[1] + q[0]) % _P
    c, d = 2 * p[3] * q[3] * _D % _P, 2 * p[2] * q[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P

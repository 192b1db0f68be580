"""Encodings of factors and steps of head rows: near, bounded, and decoded alike everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora_edge.errors import UsageError
from sdlora_edge.formats.encoding import (
    BLOCK,
    ENCODINGS,
    Factors,
    decode,
    encode,
    parts,
    shapes,
)

RANK, ROWS, COLUMNS = 4, 70, 96


def some(seed: int = 0) -> Factors:
    random = np.random.default_rng(seed)
    scale = np.array([1e-3, 1, 0.02, 300], np.float32)  # rank rows of very different size
    A = random.standard_normal((RANK, COLUMNS)).astype(np.float32) * scale[:, None]
    return Factors(A, random.standard_normal((ROWS, RANK)).astype(np.float32) / scale)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_factor_comes_back_near_and_is_stored_as_said(encoding: str) -> None:
    exact, shipped = some(), encode(some(), encoding)
    assert {part: array.shape for part, array in shipped.stored.items()} == shapes(
        encoding, RANK, ROWS, COLUMNS
    )
    assert tuple(shipped.stored) == parts(encoding)
    for got, wanted in ((shipped.A, exact.A), (shipped.B.T, exact.B.T)):
        assert got.shape == wanted.shape
        ends = np.abs(wanted).max(axis=1, keepdims=True)
        allowed = {
            "fp32": 0 * ends,
            "fp16": ends * 2.0**-11,
            "int8": ends / 253,
            "int4": ends * 0.16,
        }[encoding]
        assert (np.abs(got - wanted) <= allowed + 1e-7).all()


def test_int8_and_int4_are_decoded_by_hand_alike() -> None:
    """Value by value, in plain Python, as docs/packet.md says."""
    for encoding in ("int8", "int4"):
        shipped = encode(some(), encoding)
        stored, scale = shipped.stored["A"], shipped.stored["A.scale"]
        for i in range(RANK):
            for j in range(COLUMNS):
                if encoding == "int8":
                    q, s = int(stored[i, j]), scale[i]
                else:
                    half = (int(stored[i, j // 2]) >> 4 * (j % 2)) & 15
                    q, s = half - 16 * (half > 7), scale[i, j // BLOCK]
                assert shipped.A[i, j] == np.float32(q) * np.float32(s)


def test_int4_takes_the_scale_with_the_least_error() -> None:
    rows = np.random.default_rng(3).standard_normal((50, BLOCK)).astype(np.float32)
    shipped = encode(Factors(rows, rows.T), "int4")
    plain = (np.abs(rows).max(axis=1) / 7).astype(np.float16).astype(np.float32)[:, None]
    error, naive = (
        ((shipped.A - rows) ** 2).sum(),
        ((np.rint(rows / plain).clip(-7, 7) * plain - rows) ** 2).sum(),
    )
    assert error < 0.95 * naive
    np.testing.assert_array_equal(shipped.A, shipped.B.T)


def test_zeros_odd_widths_and_what_does_not_fit() -> None:
    for encoding in ENCODINGS:
        assert not encode(Factors(np.zeros((2, 4)), np.zeros((6, 2))), encoding).A.any()
    odd = Factors(np.ones((2, 5)), np.ones((6, 2)))
    with pytest.raises(UsageError, match="use int8"):
        encode(odd, "int4")
    assert encode(odd, "int8").A.shape == (2, 5)
    for encoding, value in (("fp16", 1e6), ("int8", np.inf), ("int4", 1e9), ("fp32", np.nan)):
        with pytest.raises(ValueError, match="does not fit"):
            encode(Factors(np.full((2, 4), value), np.ones((6, 2))), encoding)


def test_every_byte_decodes_to_something_finite() -> None:
    every = np.arange(256, dtype=np.uint8)[None]
    values = decode(every, np.ones((1, 512 // BLOCK), np.float16))
    assert sorted(set(values[0].tolist())) == list(range(-8, 8))
    assert values[0, :4].tolist() == [0, 0, 1, 0]  # bytes 0x00, 0x01: the low half comes first

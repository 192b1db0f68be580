"""How factors travel: their encodings. numpy only. `head_update` has the rows of the head.

Host and device run the same lines. Every operation below is IEEE float32, rounded to nearest after
each step, so a value decodes to the same bits on every machine. A factor is encoded in rank rows:
a row of A, or a column of B.

    fp32, fp16   A (rank, columns) and B (rows, rank) as they are
    int8         A int8 (rank, columns) and B int8 (rank, rows), transposed; one float32 scale for
                 each rank row:  x = q scale
    int4         two values a byte, low half first, each in -8..7: A uint8 (rank, columns / 2) and
                 B uint8 (rank, rows / 2), transposed; one float16 scale for each BLOCK values of a
                 rank row:  x = q scale
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import UsageError

ENCODINGS = ("fp32", "fp16", "int8", "int4")
DEFAULT = "fp16"
BLOCK = 32
"""Values that share a scale in int4. Measured on a run's B A: 16 removes a tenth of the error for a
tenth more bytes, 64 adds 8 % to it for 5 % fewer bytes. int4 has a relative error of 0.11, int8 of
0.009."""
DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int4": np.uint8}
"""Of a factor as it is stored."""
SCALE_DTYPES = {"int8": np.float32, "int4": np.float16}
LARGEST = {"int8": 127, "int4": 7}
"""The largest integer that an encoder writes."""
_SHRINK = np.linspace(1.0, 0.7, 7, dtype=np.float32)
"""Shares of a block's largest value that int4 tries as the end of its scale. The one with the least
squared error is used: 6 % less error than 1 alone."""


class Factors:
    """One direction B A of one projection, its norm folded into B, as shipped.

    Attributes:
        stored: {"A", "B"}, and {"A.scale", "B.scale"} for int8 and int4, in the shapes that this
            module's docstring gives.
        A: The decoded A, (rank, columns): float32 if it was quantised, else as stored.
        B: The decoded B, (rows, rank).
    """

    def __init__(
        self,
        A: np.ndarray,
        B: np.ndarray,
        A_scale: np.ndarray | None = None,
        B_scale: np.ndarray | None = None,
    ) -> None:
        scales = (
            {} if A_scale is None or B_scale is None else {"A.scale": A_scale, "B.scale": B_scale}
        )
        self.stored: Mapping[str, np.ndarray] = {"A": A, "B": B, **scales}

    @property
    def A(self) -> np.ndarray:
        return (
            decode(self.stored["A"], self.stored["A.scale"])
            if "A.scale" in self.stored
            else self.stored["A"]
        )

    @property
    def B(self) -> np.ndarray:
        return (
            decode(self.stored["B"], self.stored["B.scale"]).T
            if "B.scale" in self.stored
            else self.stored["B"]
        )


def parts(encoding: str) -> tuple[str, ...]:
    """Return the names under which `Factors.stored` holds its arrays."""
    return ("A", "B", "A.scale", "B.scale") if encoding in LARGEST else ("A", "B")


def shapes(encoding: str, rank: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored array."""
    if encoding == "int8":
        return {"A": (rank, columns), "B": (rank, rows), "A.scale": (rank,), "B.scale": (rank,)}
    if encoding == "int4":
        scales = {
            f"{part}.scale": (rank, -(-width // BLOCK))
            for part, width in (("A", columns), ("B", rows))
        }
        return {"A": (rank, columns // 2), "B": (rank, rows // 2), **scales}
    return {"A": (rank, columns), "B": (rows, rank)}


def encode(factors: Factors, encoding: str) -> Factors:
    """Encode float factors as they are shipped.

    Raises:
        ValueError: A value does not fit the encoding.
        UsageError: int4 is given a factor of odd width.
    """
    A, B = (np.asarray(x, np.float32) for x in (factors.A, factors.B))
    if encoding in LARGEST:
        (A, A_scale), (B, B_scale) = (
            _quantise(rows, encoding) for rows in (A, np.ascontiguousarray(B.T))
        )
        return Factors(A, B, A_scale, B_scale)
    dtype = DTYPES[encoding]
    with np.errstate(over="ignore"):
        shipped = Factors(A.astype(dtype), B.astype(dtype))
    if not (np.isfinite(shipped.A).all() and np.isfinite(shipped.B).all()):
        raise ValueError(f"a factor does not fit {encoding}")
    return shipped


def _quantise(rows: np.ndarray, encoding: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantise float32 (rank, n). Returns (stored, scale)."""
    if not np.isfinite(rows).all():
        raise ValueError(f"a factor does not fit {encoding}")
    if encoding == "int4":
        return _packed(rows)
    largest = LARGEST["int8"]
    scale = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(largest)).astype(np.float32)
    return nearest(rows, scale[:, None], largest), scale


def _packed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise float32 (rank, n) to int4. Returns (stored, scale)."""
    (rank, n), largest = rows.shape, LARGEST["int4"]
    if n % 2:
        raise UsageError(
            f"int4 packs two values into a byte, but a factor here has {n} columns: use int8"
        )
    blocks = np.zeros((rank, -(-n // BLOCK) * BLOCK), np.float32)
    blocks[:, :n] = rows
    blocks = blocks.reshape(rank, -1, BLOCK)
    ends = np.abs(blocks).max(axis=2) / np.float32(largest)
    with np.errstate(over="ignore"):
        tried_ends = (ends[..., None] * _SHRINK).astype(np.float16)
        scales = tried_ends.astype(np.float32)  # (rank, blocks, tried)
    if not np.isfinite(scales).all():
        raise ValueError("a factor does not fit int4")
    tried = [nearest(blocks, scales[..., i, None], largest) for i in range(len(_SHRINK))]
    errors = np.stack(
        [((q * scales[..., i, None] - blocks) ** 2).sum(axis=2) for i, q in enumerate(tried)],
        axis=-1,
    )
    best = errors.argmin(axis=-1)
    scale = np.take_along_axis(scales, best[..., None], axis=-1)
    whole = nearest(blocks, scale, largest).reshape(rank, -1)[:, :n]
    halves = (whole & 15).astype(np.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4), scale[..., 0].astype(np.float16)


def nearest(values: np.ndarray, scale: np.ndarray, largest: int) -> np.ndarray:
    """Return the nearest integers of scales, int8. They are 0 if the scale is 0."""
    safe = np.where(scale > 0, scale, np.float32(1))
    whole = np.clip(np.rint(values / safe), -largest, largest)
    return np.where(scale > 0, whole, 0).astype(np.int8)


def decode(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Decode rank rows to float32 (rank, n).

    Args:
        stored: int8 (rank, n), or packed uint8 (rank, n / 2).
        scale: (rank,) for int8, (rank, blocks) for packed values.
    """
    if stored.dtype == np.int8:
        return stored.astype(np.float32) * scale.astype(np.float32)[:, None]
    halves = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)
    # 0..15 to -8..7, the two's complement of four bits
    whole = (halves ^ 8).astype(np.float32) - np.float32(8)
    return whole * np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : whole.shape[1]]

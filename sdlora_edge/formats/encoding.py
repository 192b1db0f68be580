"""How numbers travel: the encodings of factors, and what a head's rows become. numpy only; host and device call the same lines.

A factor is encoded in rank rows: a row of A, or a column of B. Every operation below is IEEE float32, rounded to nearest after
each step, so a value decodes to the same bits on every machine.

    fp32, fp16   A (rank, columns), B (rows, rank) as they are
    int8         A int8 (rank, columns), B int8 (rank, rows), turned; one float32 scale for each rank row:  x = q scale
    int4         two values a byte, low half first, each in -8..7: A uint8 (rank, columns / 2), B uint8 (rank, rows / 2), turned;
                 one float16 scale for each BLOCK values of a rank row:  x = q scale

    head         a new class: its row in float16. A known class: its row changes by  scale q,  q int8, scale float32:
                 row(t) = row(t-1) + scale q.  Both with a float32 bias. The host takes the row so changed as its own, so what is
                 rounded away comes back with the next change, and nothing adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

ENCODINGS = ("fp32", "fp16", "int8", "int4")
DEFAULT = "fp16"
BLOCK = 32
"""values that share a scale in int4. Measured on a run's B A: 16 takes a tenth of the error away for a tenth more bytes, 64 adds
8 % to it for 5 % fewer; int4 has a relative error of 0.11, int8 of 0.009"""
DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int4": np.uint8}
"""of a factor as it is stored"""
SCALE_DTYPES = {"int8": np.float32, "int4": np.float16}
LARGEST = {"int8": 127, "int4": 7}
"""the largest whole number an encoder writes"""
_SHRINK = np.linspace(1.0, 0.7, 7, dtype=np.float32)
"""int4: shares of a block's largest value that are tried as the end of its scale; the one with the least squared error is taken
(6 % less error than 1 alone)"""


class Factors:
    """One direction B A of one projection, its norm folded into B, as shipped.

    stored: {"A", "B"} and for int8 and int4 {"A.scale", "B.scale"}, in the shapes of this module's docstring. `A` (rank, columns)
    and `B` (rows, rank) are what they stand for: float32 where they were quantised, else as stored.
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
    """The names under which `Factors.stored` holds its arrays."""
    return ("A", "B", "A.scale", "B.scale") if encoding in LARGEST else ("A", "B")


def shapes(encoding: str, rank: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shape of each stored array."""
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
    """Float factors as they are shipped. Raises ValueError where a value does not fit, UsageError where int4 meets an odd width."""
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
    """float32 (rank, n) to (stored, scale)."""
    if not np.isfinite(rows).all():
        raise ValueError(f"a factor does not fit {encoding}")
    largest = LARGEST[encoding]
    if encoding == "int8":
        scale = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(largest)).astype(np.float32)
        return _whole(rows, scale[:, None], largest), scale
    rank, n = rows.shape
    if n % 2:
        raise UsageError(
            f"int4 puts two values into a byte, and a factor here is {n} long: take int8"
        )
    blocks = np.zeros((rank, -(-n // BLOCK) * BLOCK), np.float32)
    blocks[:, :n] = rows
    blocks = blocks.reshape(rank, -1, BLOCK)
    ends = np.abs(blocks).max(axis=2) / np.float32(largest)
    with np.errstate(over="ignore"):
        scales = (
            (ends[..., None] * _SHRINK).astype(np.float16).astype(np.float32)
        )  # (rank, blocks, tried)
    if not np.isfinite(scales).all():
        raise ValueError("a factor does not fit int4")
    tried = [_whole(blocks, scales[..., i, None], largest) for i in range(len(_SHRINK))]
    errors = np.stack(
        [((q * scales[..., i, None] - blocks) ** 2).sum(axis=2) for i, q in enumerate(tried)],
        axis=-1,
    )
    best = errors.argmin(axis=-1)
    scale = np.take_along_axis(scales, best[..., None], axis=-1)
    whole = _whole(blocks, scale, largest).reshape(rank, -1)[:, :n]
    halves = (whole & 15).astype(np.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4), scale[..., 0].astype(np.float16)


def _whole(values: np.ndarray, scale: np.ndarray, largest: int) -> np.ndarray:
    """The nearest whole numbers of scales, int8; 0 where the scale is 0."""
    safe = np.where(scale > 0, scale, np.float32(1))
    return np.where(scale > 0, np.clip(np.rint(values / safe), -largest, largest), 0).astype(
        np.int8
    )


def decode(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rank rows, float32 (rank, n): int8 (rank, n) with scale (rank,), or packed uint8 (rank, n / 2) with scale (rank, blocks)."""
    if stored.dtype == np.int8:
        return stored.astype(np.float32) * scale.astype(np.float32)[:, None]
    halves = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)
    whole = (halves ^ 8).astype(np.float32) - np.float32(
        8
    )  # 0..15 to -8..7, the two's complement of four bits
    return whole * np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : whole.shape[1]]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """What a task does to the head: rows of its new classes, and steps of known classes' rows.

    new_weight: float16 (n, features); new_bias: float32 (n,). index: int32 (m,), ascending, of the rows that change; step: int8
    (m, features); scale: float32 (m,); bias: float32 (m,), the new biases themselves.
    """

    new_weight: np.ndarray
    new_bias: np.ndarray
    index: np.ndarray
    step: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def between(
        cls, old_weight: np.ndarray, old_bias: np.ndarray, weight: np.ndarray, bias: np.ndarray
    ) -> HeadRows:
        """From a state's head, (C, features) and (C,), to the whole head after the task, (C + n, features) and (C + n,).

        A row that differs by no more than float16 rounds away is not a change: it was shipped so when it was new.
        """
        known = len(old_weight)
        change = weight[:known].astype(np.float32) - old_weight
        scale = (np.abs(change).max(axis=1, initial=0.0) / np.float32(127)).astype(np.float32)
        step = _whole(change, scale[:, None], 127)
        bias = bias.astype(np.float32)
        moved = (weight[:known].astype(np.float16) != old_weight.astype(np.float16)).any(axis=1)
        step[~moved] = 0
        index = np.flatnonzero(moved | (bias[:known] != old_bias)).astype(np.int32)
        return cls(
            weight[known:].astype(np.float16),
            bias[known:],
            index,
            step[index],
            scale[index],
            bias[index],
        )

    def applied(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The head after the task, float32 (C + n, features) and (C + n,)."""
        weight = np.concatenate([weight.astype(np.float32), self.new_weight.astype(np.float32)])
        bias = np.concatenate([bias.astype(np.float32), self.new_bias])
        weight[self.index] += self.step.astype(np.float32) * self.scale[:, None]
        bias[self.index] = self.bias
        return weight, bias

    def tensors(self) -> dict[str, np.ndarray]:
        """As a packet and a run store them."""
        return dict(zip(HEAD, self.__dict__.values(), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> HeadRows:
        """The inverse of `tensors`. Raises KeyError."""
        return cls(*(tensors[name] for name in HEAD))


HEAD = (
    "head.new.weight",
    "head.new.bias",
    "head.old.index",
    "head.old.step",
    "head.old.scale",
    "head.old.bias",
)

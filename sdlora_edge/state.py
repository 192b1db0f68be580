"""What a task leaves behind, and the one rule of arithmetic by which every machine turns it into weights. numpy only.

    W_t = W_e + sum_k ( alpha_k(t) - alpha_k(e) ) * B_k A_k          (alpha_k(e) = 0 for k > e)

`merge` is that line. Host and device both call it, on the factors as the packet carries them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .canonical import dump_json, sha256, tensors_digest

MAGNITUDE_STEP = 2.0**-24
"""Magnitudes are multiples of this, so their differences and sums are exact in float64: no drift over any number of packets."""


@dataclass(frozen=True)
class Projection:
    """An adapted slice of a weight: rows [start, stop) of the (rows, columns) tensor `tensor`."""

    name: str
    tensor: str
    start: int
    stop: int
    columns: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tensor": self.tensor,
            "rows": [self.start, self.stop],
            "shape": [self.stop - self.start, self.columns],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Projection:
        start, stop = value["rows"]
        rows, columns = value["shape"]
        if not all(type(n) is int for n in (start, stop, rows, columns)):
            raise TypeError(f"projection {value['name']}: rows and shape must be whole numbers")
        if not (0 <= start < stop and stop - start == rows and columns > 0):
            raise ValueError(f"projection {value['name']}: rows {value['rows']} do not fit shape {value['shape']}")
        return cls(str(value["name"]), str(value["tensor"]), start, stop, columns)


@dataclass(frozen=True, eq=False)
class Factors:
    """One direction B A of one projection, its norm folded into B. A: (rank, columns), B: (rows, rank), as shipped."""

    A: np.ndarray
    B: np.ndarray


@dataclass(frozen=True, eq=False)
class TaskState:
    """What task t left behind. Task 0 is the state before the first task: the backbone, and the base head if it has one.

    factors: of this task alone, by projection name. magnitudes: float64 (t,), all of them, multiples of MAGNITUDE_STEP; or
    (t, projections) where each projection has its own.
    classes: every class known by now, in the order of the head's rows. head_weight: float32 (C, features), float16
    values; head_bias: float32 (C,). digest: the state digest S_t.
    """

    task: int
    name: str
    digest: str
    classes: tuple[str, ...]
    magnitudes: np.ndarray
    head_weight: np.ndarray
    head_bias: np.ndarray
    factors: Mapping[str, Factors]


@dataclass(frozen=True, eq=False)
class TaskUpdate:
    """What takes a device from the state of task t-1 to that of task t: the payload of a packet.

    deltas: float64 (t,) or (t, projections), alpha_k(t) - alpha_k(t-1), the last one being alpha_t itself. head_index: int32 (n,), rows of the
    head that are new or changed; head_weight: float16 (n, features); head_bias: float32 (n,).
    """

    task: int
    name: str
    classes: tuple[str, ...]
    deltas: np.ndarray
    head_index: np.ndarray
    head_weight: np.ndarray
    head_bias: np.ndarray
    factors: Mapping[str, Factors]

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything but the names and the deltas, as a packet and a run store it."""
        stored = {"head.index": self.head_index, "head.weight": self.head_weight, "head.bias": self.head_bias}
        return stored | factor_tensors(self.factors)

    def digest(self) -> str:
        """The payload digest: over what the arithmetic depends on, and nothing else."""
        return sha256(dump_json(self.deltas.tolist()), tensors_digest(self.tensors()).encode())


def changed_rows(state: TaskState, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(head_index, head_weight, head_bias) of a `TaskUpdate`: the rows of a whole new head that are not the state's own.

    weight: float32 (C, features), rounded to float16 here; bias: float32 (C,).
    """
    weight, old = weight.astype(np.float16), len(state.classes)
    same = (weight[:old] == state.head_weight).all(axis=1) & (bias[:old] == state.head_bias)
    index = np.flatnonzero(np.append(~same, np.ones(len(weight) - old, bool))).astype(np.int32)
    return index, weight[index], bias[index].astype(np.float32)


def factor_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """{`<projection>.A`: A, `<projection>.B`: B}."""
    return {f"{name}.{part}": getattr(f, part) for name, f in factors.items() for part in ("A", "B")}


def factors_from(tensors: Mapping[str, np.ndarray], names: Iterable[str], prefix: str = "") -> dict[str, Factors]:
    """The inverse of `factor_tensors`: the factors of those projections in `names` that have any."""
    return {
        name: Factors(tensors[f"{prefix}{name}.A"], tensors[f"{prefix}{name}.B"])
        for name in names
        if f"{prefix}{name}.A" in tensors
    }


def round_magnitudes(magnitudes: np.ndarray) -> np.ndarray:
    """The nearest multiples of MAGNITUDE_STEP, float64."""
    return np.round(np.asarray(magnitudes, np.float64) / MAGNITUDE_STEP) * MAGNITUDE_STEP + 0.0  # no negative zero


def extended(magnitudes: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Magnitudes of fewer tasks, (s,) or (s, projections), with zeros for the tasks after them: in the shape of `like`."""
    found = np.zeros(like.shape)
    if len(magnitudes):
        found[: len(magnitudes)] = magnitudes
    return found


def lineage_id(
    backbone_digest: str,
    projections: Sequence[Projection],
    encoding: str,
    head_weight: np.ndarray,
    head_bias: np.ndarray,
) -> str:
    """S_0: what every packet of one run descends from."""
    head = tensors_digest({"head.weight": head_weight, "head.bias": head_bias})
    parts = {"backbone": backbone_digest, "projections": [p.to_dict() for p in projections], "encoding": encoding, "head": head}
    return sha256(dump_json(parts))


def next_digest(digest: str, payload_digest: str) -> str:
    """S_t = sha256(S_{t-1}, payload digest of task t)."""
    return sha256(bytes.fromhex(digest), bytes.fromhex(payload_digest))


def advance(state: TaskState, update: TaskUpdate) -> TaskState:
    """The state after `update`. The update's shapes must fit (`packet.check` proves it for one from outside)."""
    classes = state.classes + update.classes
    weight = np.zeros((len(classes), state.head_weight.shape[1]), np.float32)
    bias = np.zeros(len(classes), np.float32)
    weight[: len(state.classes)], bias[: len(state.classes)] = state.head_weight, state.head_bias
    weight[update.head_index], bias[update.head_index] = update.head_weight, update.head_bias
    magnitudes = extended(state.magnitudes, update.deltas) + update.deltas
    digest = next_digest(state.digest, update.digest())
    return TaskState(update.task, update.name, digest, classes, magnitudes, weight, bias, update.factors)


def merge(
    weights: Mapping[str, np.ndarray],
    projections: Sequence[Projection],
    factors: Sequence[Mapping[str, Factors]],
    coefficients: np.ndarray,
) -> dict[str, np.ndarray]:
    """W + sum_k c_k B_k A_k for every adapted weight; the one place where updates become weights.

    weights: {tensor: float32 (rows, columns)}, left as they are. factors: one mapping per task, in task order.
    coefficients: float64 (tasks,) or (tasks, projections), alpha_k(t) - alpha_k(e). Returns new float32 arrays. A task without factors for a
    projection (an absorbed task) adds nothing to it. Fixed order: tasks first to last, one product per projection.
    """
    if len(factors) != len(coefficients):
        raise ValueError(f"{len(factors)} tasks of factors but {len(coefficients)} coefficients")
    merged = {name: np.array(weight, np.float32) for name, weight in weights.items()}
    for i, p in enumerate(projections):
        own = coefficients if coefficients.ndim == 1 else coefficients[:, i]
        parts = [(f[p.name], np.float32(c)) for f, c in zip(factors, own, strict=True) if p.name in f and c != 0.0]
        if parts:
            A = np.concatenate([f.A.astype(np.float32) for f, _ in parts])  # (sum of ranks, columns)
            B = np.concatenate([f.B.astype(np.float32) * c for f, c in parts], axis=1)  # (rows, sum of ranks)
            merged[p.tensor][p.start : p.stop] += B @ A
    return merged

"""What a task leaves behind, and the one rule of arithmetic by which every machine turns it into weights. numpy only.

    W_t = W_e + sum_k ( alpha_k(t) - alpha_k(e) ) * B_k A_k          (alpha_k(e) = 0 for k > e)

`Merging` is that line. Host and device both use it, on the factors as the packet carries them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .formats.canonical import dump_json, sha256, tensors_digest
from .formats.encoding import DEFAULT, Factors, HeadRows, parts

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
            raise ValueError(
                f"projection {value['name']}: rows {value['rows']} do not fit shape {value['shape']}"
            )
        return cls(str(value["name"]), str(value["tensor"]), start, stop, columns)


@dataclass(frozen=True, eq=False)
class TaskState:
    """What task t left behind. Task 0 is the state before the first task: the backbone, and the base head if it has one.

    factors: of this task alone, by projection name. magnitudes: float64 (t,), all of them, multiples of MAGNITUDE_STEP; or
    (t, projections) where each projection has its own. before: digests of the states that led to it, as far back as is known.
    classes: every class known by now, in the order of the head's rows. head_weight: float32 (C, features); head_bias:
    float32 (C,): what a device computes from the rows and steps it got. digest: the state digest S_t.
    """

    task: int
    name: str
    digest: str
    classes: tuple[str, ...]
    magnitudes: np.ndarray
    head_weight: np.ndarray
    head_bias: np.ndarray
    factors: Mapping[str, Factors]
    before: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TaskUpdate:
    """What takes a device from the state of task t-1 to that of task t: the payload of a packet.

    deltas: float64 (t,) or (t, projections), alpha_k(t) - alpha_k(t-1), the last one being alpha_t itself.
    """

    task: int
    name: str
    classes: tuple[str, ...]
    deltas: np.ndarray
    head: HeadRows
    factors: Mapping[str, Factors]

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything but the names and the deltas, as a packet and a run store it."""
        return self.head.tensors() | factor_tensors(self.factors)

    def digest(self) -> str:
        """The payload digest: over what the arithmetic depends on, and nothing else."""
        return sha256(dump_json(self.deltas.tolist()), tensors_digest(self.tensors()).encode())


def changed_rows(state: TaskState, weight: np.ndarray, bias: np.ndarray) -> HeadRows:
    """What takes the state's head to a whole new one as nearly as it can be shipped: weight float32 (C, features), bias float32 (C,)."""
    return HeadRows.between(state.head_weight, state.head_bias, weight, bias)


def factor_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """{`<projection>.A`: A, `<projection>.B`: B}, and their scales, as stored."""
    return {
        f"{name}.{part}": array for name, f in factors.items() for part, array in f.stored.items()
    }


def factors_from(
    tensors: Mapping[str, np.ndarray],
    names: Iterable[str],
    prefix: str = "",
    encoding: str = DEFAULT,
) -> dict[str, Factors]:
    """The inverse of `factor_tensors`: the factors of those projections in `names` that have any. Raises KeyError."""
    return {
        name: Factors(*(tensors[f"{prefix}{name}.{part}"] for part in parts(encoding)))
        for name in names
        if f"{prefix}{name}.A" in tensors
    }


def round_magnitudes(magnitudes: np.ndarray) -> np.ndarray:
    """The nearest multiples of MAGNITUDE_STEP, float64."""
    return (
        np.round(np.asarray(magnitudes, np.float64) / MAGNITUDE_STEP) * MAGNITUDE_STEP + 0.0
    )  # no negative zero


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
    base = {
        "backbone": backbone_digest,
        "projections": [p.to_dict() for p in projections],
        "encoding": encoding,
        "head": head,
    }
    return sha256(dump_json(base))


def next_digest(digest: str, payload_digest: str) -> str:
    """S_t = sha256(S_{t-1}, payload digest of task t)."""
    return sha256(bytes.fromhex(digest), bytes.fromhex(payload_digest))


def advance(state: TaskState, update: TaskUpdate) -> TaskState:
    """The state after `update`. The update's shapes must fit (`packet.check` proves it for one from outside)."""
    classes = state.classes + update.classes
    weight, bias = update.head.applied(state.head_weight, state.head_bias)
    magnitudes = extended(state.magnitudes, update.deltas) + update.deltas
    digest = next_digest(state.digest, update.digest())
    before = (*state.before, state.digest)
    return TaskState(
        update.task, update.name, digest, classes, magnitudes, weight, bias, update.factors, before
    )


class Merging(Mapping[str, np.ndarray]):
    """W + sum_k c_k B_k A_k by the name of the weight, each computed when it is asked for: whoever takes one after the other
    holds one at a time. The one place where updates become weights.

    weights: {tensor: float32 (rows, columns)}, left as they are; those that no projection adapts come out as they went in.
    factors: one mapping per task, in task order. coefficients: float64 (tasks,) or (tasks, projections), alpha_k(t) -
    alpha_k(e). Computes new float32 arrays. A task without factors for a projection (an absorbed task) adds nothing to it.
    Fixed order: tasks first to last, one product per projection. Raises ValueError unless there is a coefficient for each task.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        projections: Sequence[Projection],
        factors: Sequence[Mapping[str, Factors]],
        coefficients: np.ndarray,
    ) -> None:
        if len(factors) != len(coefficients):
            raise ValueError(
                f"{len(factors)} tasks of factors but {len(coefficients)} coefficients"
            )
        self._weights, self._projections, self._factors, self._coefficients = (
            weights,
            projections,
            factors,
            coefficients,
        )

    def __getitem__(self, name: str) -> np.ndarray:
        merged = np.array(self._weights[name], np.float32)
        for i, p in enumerate(self._projections):
            if p.tensor != name:
                continue
            own = self._coefficients if self._coefficients.ndim == 1 else self._coefficients[:, i]
            used = [
                (f[p.name], np.float32(c))
                for f, c in zip(self._factors, own, strict=True)
                if p.name in f and c != 0.0
            ]
            if used:
                A = np.concatenate(
                    [f.A.astype(np.float32) for f, _ in used]
                )  # (sum of ranks, columns)
                B = np.concatenate(
                    [f.B.astype(np.float32) * c for f, c in used], axis=1
                )  # (rows, sum of ranks)
                merged[p.start : p.stop] += B @ A
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def merge(
    weights: Mapping[str, np.ndarray],
    projections: Sequence[Projection],
    factors: Sequence[Mapping[str, Factors]],
    coefficients: np.ndarray,
) -> dict[str, np.ndarray]:
    """All of `Merging` at once."""
    return dict(Merging(weights, projections, factors, coefficients))

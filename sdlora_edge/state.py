"""What a task leaves behind, and the one rule of arithmetic that turns it into weights. numpy only.

    W_t = W_e + sum_k ( alpha_k(t) - alpha_k(e) ) * B_k A_k          (alpha_k(e) = 0 for k > e)

`Merging` is that line. Host and device both use it, on the factors as the packet carries them.

Rows of the head never move. A class that is retired keeps its row, without a name: its weight
becomes 0 and its bias UNUSED, so no program that runs the model needs to know about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .formats.canonical import UNIT, dump_json, sha256, tensors_digest, to_units
from .formats.confidence import Confidence
from .formats.encoding import DEFAULT, Factors, parts
from .formats.head_update import HeadUpdate, Step

UNUSED = -1e30
"""The bias of a head row that is never answered: of a retired class, or of spare capacity."""


@dataclass(frozen=True)
class Projection:
    """An adapted slice of a weight: rows [start, stop) of the tensor `tensor`, (rows, columns)."""

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
            raise TypeError(f"projection {value['name']}: rows and shape must be integers")
        if not (0 <= start < stop and stop - start == rows and columns > 0):
            raise ValueError(
                f"projection {value['name']}: rows {value['rows']} do not fit shape "
                f"{value['shape']}"
            )
        return cls(str(value["name"]), str(value["tensor"]), start, stop, columns)


@dataclass(frozen=True, eq=False)
class TaskState:
    """What task t left behind.

    Task 0 is the state before the first task: the backbone, and the base head if it has one.

    Attributes:
        digest: The state digest S_t.
        classes: The class of each row of the head. None for a row whose class was retired: such a
            row is never answered. Live names are unique.
        magnitudes: float64 (t,), of all tasks, multiples of `canonical.UNIT`; or (t, projections)
            if each projection has its own.
        head_weight: float32 (rows, features), as a device computes it from rows and steps.
        head_bias: float32 (rows,).
        factors: Of this task alone, by projection name.
        confidence: What the state knows of its own answers.
        before: Digests of the states that led to this one, S_0 first, if they are known.
    """

    task: int
    name: str
    digest: str
    classes: tuple[str | None, ...]
    magnitudes: np.ndarray
    head_weight: np.ndarray
    head_bias: np.ndarray
    factors: Mapping[str, Factors]
    confidence: Confidence
    before: tuple[str, ...] = ()

    @property
    def live(self) -> list[int]:
        """The rows that have a class, ascending."""
        return [row for row, name in enumerate(self.classes) if name is not None]

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that can be answered, in the order of their rows."""
        return tuple(name for name in self.classes if name is not None)

    @property
    def states(self) -> tuple[str, ...]:
        """The digests of all states up to this one."""
        return (*self.before, self.digest)


@dataclass(frozen=True, eq=False)
class TaskUpdate:
    """What takes a device from the state of task t-1 to that of task t: the payload of a packet.

    Effects come in this order: retire, rename, new classes. So a name that a task retires may come
    back as a new class of the same task.

    Attributes:
        classes: Names of the new classes, whose rows are appended to the head.
        deltas: float64 (t,) or (t, projections), alpha_k(t) - alpha_k(t-1). The last one is
            alpha_t itself.
        retired: Rows of known classes that are never answered again, ascending.
        renamed: (row, new name) of known classes, ascending.
    """

    task: int
    name: str
    classes: tuple[str, ...]
    deltas: np.ndarray
    head: HeadUpdate
    factors: Mapping[str, Factors]
    retired: tuple[int, ...] = ()
    renamed: tuple[tuple[int, str], ...] = ()

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors, named as a packet and a run store them."""
        return self.head.tensors() | factor_tensors(self.factors)

    def digest(self) -> str:
        """Return the payload digest: over what a device computes with, and the class names."""
        payload = {
            "classes": list(self.classes),
            "deltas": to_units(self.deltas),
            "renamed": [list(pair) for pair in self.renamed],
            "retired": list(self.retired),
            "tensors": tensors_digest(self.tensors()),
        }
        return sha256(dump_json(payload))


def changed_rows(
    state: TaskState,
    weight: np.ndarray,
    bias: np.ndarray,
    retired: Sequence[int] = (),
    step: Step | None = None,
    confidence: Confidence | None = None,
) -> HeadUpdate:
    """Find the update from the state's head to a whole new one, as nearly as it can be shipped.

    Args:
        state: The state before the task.
        weight: (rows, features), the head after the task. Retired rows are ignored.
        bias: (rows,).
        retired: Rows that the task retires.
        step: How changes of known rows are rounded.
        confidence: After the task. Default: nothing is known.

    Raises:
        ValueError: A number is not finite.
    """
    fixed = {row for row, name in enumerate(state.classes) if name is None} | set(retired)
    old = state.head_weight, state.head_bias
    return HeadUpdate.between(old, (weight, bias), sorted(fixed), step, confidence)


def factor_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """Return {`<projection>.A`: A, `<projection>.B`: B}, and their scales, as stored."""
    return {
        f"{name}.{part}": array for name, f in factors.items() for part, array in f.stored.items()
    }


def factors_from(
    tensors: Mapping[str, np.ndarray],
    names: Iterable[str],
    prefix: str = "",
    encoding: str = DEFAULT,
) -> dict[str, Factors]:
    """Read what `factor_tensors` has named, for those projections in `names` that have factors.

    Raises:
        KeyError: A tensor of a projection is missing.
    """
    return {
        name: Factors(*(tensors[f"{prefix}{name}.{part}"] for part in parts(encoding)))
        for name in names
        if f"{prefix}{name}.A" in tensors
    }


def round_magnitudes(magnitudes: np.ndarray) -> np.ndarray:
    """Return the nearest multiples of UNIT, float64."""
    units = np.round(np.asarray(magnitudes, np.float64) / UNIT)
    return units * UNIT + 0.0  # + 0.0 turns a negative zero into zero


def extended(magnitudes: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Pad the magnitudes of fewer tasks with zeros for later tasks, to the shape of `like`."""
    found = np.zeros(like.shape)
    if len(magnitudes):
        found[: len(magnitudes)] = magnitudes
    return found


def lineage_id(
    backbone_digest: str,
    projections: Sequence[Projection],
    encoding: str,
    classes: Sequence[str | None],
    head: tuple[np.ndarray, np.ndarray],
    features: str,
) -> str:
    """Return S_0, from which every packet of one run descends.

    Args:
        backbone_digest: `tensors_digest` of all parameters and buffers.
        projections: The adapted slices, in order.
        encoding: Of the factors.
        classes: Of the base head's rows.
        head: The base head's weight (rows, features) and bias (rows,), float32.
        features: What the head sees, as text.
    """
    base = {
        "backbone": backbone_digest,
        "classes": list(classes),
        "projections": [p.to_dict() for p in projections],
        "encoding": encoding,
        "features": features,
        "head": tensors_digest({"head.weight": head[0], "head.bias": head[1]}),
    }
    return sha256(dump_json(base))


def next_digest(digest: str, payload_digest: str) -> str:
    """Return S_t = sha256(S_{t-1}, payload digest of task t)."""
    return sha256(bytes.fromhex(digest), bytes.fromhex(payload_digest))


def classes_after(classes: Sequence[str | None], update: TaskUpdate) -> tuple[str | None, ...]:
    """Return the class of each row after `update`. The order of effects is part of the format."""
    after = list(classes)
    for row in update.retired:
        after[row] = None
    for row, name in update.renamed:
        after[row] = name
    return (*after, *update.classes)


def advance(state: TaskState, update: TaskUpdate) -> TaskState:
    """Return the state after `update`, whose shapes must fit.

    `formats.lead` proves that for an update that comes from outside.
    """
    weight, bias = update.head.applied(state.head_weight, state.head_bias)
    weight[list(update.retired)], bias[list(update.retired)] = 0.0, UNUSED
    return TaskState(
        update.task,
        update.name,
        next_digest(state.digest, update.digest()),
        classes_after(state.classes, update),
        extended(state.magnitudes, update.deltas) + update.deltas,
        weight,
        bias,
        update.factors,
        update.head.confidence,
        state.states,
    )


class Merging(Mapping[str, np.ndarray]):
    """W + sum_k c_k B_k A_k by the name of the weight. The one place where updates become weights.

    Each weight is computed when it is asked for, as a new float32 array. So a caller that takes
    one after the other holds one at a time. A task without factors for a projection (an absorbed
    task) adds nothing to it.

    Args:
        weights: {tensor: float32 (rows, columns)}, which are not changed. A weight that no
            projection adapts comes out as it is.
        projections: The adapted slices, in order.
        factors: One mapping for each task, in task order.
        coefficients: float64 (tasks,) or (tasks, projections), alpha_k(t) - alpha_k(e).

    Raises:
        ValueError: There is not one coefficient for each task.
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
            # One product for each projection, tasks first to last: a fixed order, so that a weight
            # does not depend on the packets that it came in.
            if used:
                # (sum of ranks, columns) and (rows, sum of ranks)
                A = np.concatenate([f.A.astype(np.float32) for f, _ in used])
                B = np.concatenate([f.B.astype(np.float32) * c for f, c in used], axis=1)
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
    """Compute all of `Merging` at once."""
    return dict(Merging(weights, projections, factors, coefficients))

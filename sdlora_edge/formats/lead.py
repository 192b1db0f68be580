"""Does an update fit the state that it follows? Names, shapes, dtypes and values. numpy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..state import Projection, TaskState, TaskUpdate, advance, classes_after
from . import encoding as encodings
from .bounds import Bounds, confidence_bounds, scale_bounds
from .head_update import HeadUpdate
from .limits import LIMITS
from .packet import Packet


def lead(packet: Packet, state: TaskState, projections: Sequence[Projection]) -> TaskState:
    """Return the state after all tasks of a packet.

    Args:
        packet: Verified. It begins at the task after `state`.
        state: The state before the packet.
        projections: Of the bundle, in its order.

    Raises:
        InputError: A name, shape or value is wrong, or the tasks do not lead to `packet.end`.
    """
    known = {p.name: p for p in projections}
    for update in packet.updates:
        _require_names(update, state)
        _require_magnitudes(update, state, len(projections))
        for tensor in _tensors(update, state, known, packet.encoding):
            if tensor.problem:
                raise InputError(f"packet {update.task}: {tensor.problem}")
        _require_rows(update, state)
        state = advance(state, update)
        _require_bounds(state)
    if packet.canary_logits.shape[1] != len(state.live):
        raise InputError(
            f"packet {packet.sequence}: its canary has {packet.canary_logits.shape[1]} logits, "
            f"but {len(state.live)} classes are live: build it again"
        )
    if state.digest != packet.end:
        raise InputError(
            f"packet {packet.sequence} does not lead to the state it names: build it again"
        )
    return state


def _require_names(update: TaskUpdate, state: TaskState) -> None:
    live, touched = set(state.live), [*update.retired, *(row for row, _ in update.renamed)]
    if gone := set(touched) - live:
        raise InputError(
            f"packet {update.task} retires or renames row {min(gone)}, which has no class"
        )
    if len(set(touched)) != len(touched):
        raise InputError(f"packet {update.task} renames a class that it retires")
    counts = Counter(name for name in classes_after(state.classes, update) if name is not None)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"packet {update.task} gives two rows the class {twice[0]!r}")
    if live and not counts:
        raise InputError(f"packet {update.task} retires every class")


def _require_magnitudes(update: TaskUpdate, state: TaskState, projections: int) -> None:
    own = (projections,) if update.deltas.ndim == 2 else ()
    mixed = state.task and state.magnitudes.ndim != update.deltas.ndim
    if update.deltas.shape[1:] != own or mixed:
        raise InputError(
            f"packet {update.task}: magnitude deltas of shape {update.deltas.shape} do not follow "
            f"magnitudes of shape {state.magnitudes.shape}"
        )


def _tensors(
    update: TaskUpdate, state: TaskState, projections: Mapping[str, Projection], encoding: str
) -> Iterator[Bounds]:
    """Every tensor of the update. Raises InputError for factors that no tensor could be."""
    live = sum(name is not None for name in classes_after(state.classes, update))
    features = state.head_weight.shape[1]
    yield from _rows(update.head, len(update.classes), features)
    yield from confidence_bounds(update.head.confidence, live, features)
    for name, factors in update.factors.items():
        if (p := projections.get(name)) is None:
            raise InputError(
                f"packet {update.task} adapts {name!r}, which this bundle does not have"
            )
        rows = p.stop - p.start
        if encoding == "int4" and (p.columns % 2 or rows % 2):
            raise InputError(
                f"packet {update.task}: {name} has an odd width, which int4 cannot carry"
            )
        stored = factors.stored
        rank = len(stored["A"]) if stored["A"].ndim == 2 else 0
        if rank < 1:
            raise InputError(f"packet {update.task}: {name}.A has no rows")
        for part, shape in encodings.shapes(encoding, rank, rows, p.columns).items():
            scale = part.endswith(".scale")
            dtype = (encodings.SCALE_DTYPES if scale else encodings.DTYPES)[encoding]
            bounds = scale_bounds if scale else Bounds
            yield bounds(f"{name}.{part}", stored[part], dtype, shape)


def _rows(head: HeadUpdate, n: int, features: int) -> Iterator[Bounds]:
    """The tensors of head rows. n: number of new classes."""
    m, rank = len(head.index), len(head.right) if head.right.ndim == 2 else 0
    rank = min(rank, LIMITS.step_rank)
    rows = -(2**31), 2**31 - 1  # `_require_rows` has the bounds of row numbers
    yield Bounds("head.new.weight", head.new, np.int8, (n, features))
    yield scale_bounds("head.new.scale", head.new_scale, np.float32, (n,))
    yield Bounds("head.new.bias", head.new_bias, np.float32, (n,))
    yield Bounds("head.old.index", head.index, np.int32, (m,), *rows)
    yield Bounds("head.old.left", head.left, np.int8, (m, rank))
    yield Bounds("head.old.right", head.right, np.int8, (rank, features))
    yield scale_bounds("head.old.scale", head.scale, np.float32, (m,))
    yield Bounds("head.old.bias", head.bias, np.float32, (m,))


def _require_rows(update: TaskUpdate, state: TaskState) -> None:
    """Steps of known rows: ascending, and of rows that still have a class."""
    index, known = update.head.index.astype(np.int64), len(state.classes)
    if (np.diff(index) <= 0).any() or (index < 0).any() or (index >= known).any():
        raise InputError(
            f"packet {update.task}: head.old.index is not ascending within {known} rows"
        )
    live = set(state.live) - set(update.retired)
    if stepped := set(index.tolist()) - live:
        raise InputError(f"packet {update.task} changes row {min(stepped)}, which is retired")


def _require_bounds(state: TaskState) -> None:
    """Bounded steps could add up: in the head's rows, and in the magnitudes."""
    if not _bounded(state.head_weight, LIMITS.magnitude):
        raise InputError(f"packet {state.task}: a head row is too large after it")
    if not _bounded(state.magnitudes, LIMITS.magnitude):
        raise InputError(f"packet {state.task}: a magnitude is above {LIMITS.magnitude} after it")
    if len(state.classes) > LIMITS.rows:
        raise InputError(
            f"packet {state.task}: the head has {len(state.classes)} rows after it, more than "
            f"{LIMITS.rows}"
        )


def _bounded(array: np.ndarray, bound: float) -> bool:
    """Tell whether no value is NaN, infinite or beyond the bound."""
    return not array.size or bool(array.min() >= -bound and array.max() <= bound)

"""The one rule of arithmetic, and the digests of states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.state import (
    UNUSED,
    Factors,
    Projection,
    TaskState,
    TaskUpdate,
    advance,
    changed_rows,
    merge,
    next_digest,
    round_magnitudes,
)

Q, V = Projection("a.q", "a.qkv.weight", 0, 6, 6), Projection("a.v", "a.qkv.weight", 12, 18, 6)


def some_factors(tasks: int, seed: int = 0, rank: int = 2) -> list[dict[str, Factors]]:
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float16)

    return [{p.name: Factors(draw(rank, 6), draw(6, rank)) for p in (Q, V)} for _ in range(tasks)]


def test_merge_is_the_sum_of_the_design() -> None:
    base = {"a.qkv.weight": np.random.default_rng(1).standard_normal((18, 6)).astype(np.float32)}
    factors, alpha = some_factors(3), np.array([0.5, -1.25, 2.0])
    merged = merge(base, [Q, V], factors, alpha)["a.qkv.weight"]
    for p in (Q, V):
        rows = slice(p.start, p.stop)
        exact = base["a.qkv.weight"][rows].astype(np.float64)
        for f, a in zip(factors, alpha, strict=True):
            exact = exact + a * f[p.name].B.astype(np.float64) @ f[p.name].A.astype(np.float64)
        np.testing.assert_allclose(merged[rows], exact, atol=1e-5)
    np.testing.assert_array_equal(merged[6:12], base["a.qkv.weight"][6:12])  # keys are not adapted


def test_merge_from_any_exported_state_gives_the_same_weights() -> None:
    base = {"a.qkv.weight": np.zeros((18, 6), np.float32)}
    factors = some_factors(4)
    early, late = np.array([1.0, 0.5, 0, 0]), np.array([0.75, -0.5, 1.5, 2.0])
    exported = merge(base, [Q, V], factors, early)
    on_device = merge(exported, [Q, V], factors, late - early)["a.qkv.weight"]
    np.testing.assert_allclose(
        on_device, merge(base, [Q, V], factors, late)["a.qkv.weight"], atol=1e-5
    )


def test_merge_repeats_to_the_bit_and_leaves_its_input() -> None:
    base = {"a.qkv.weight": np.ones((18, 6), np.float32)}
    factors = some_factors(5)
    first, second = (
        merge(base, [Q, V], factors, np.linspace(-1, 1, 5))["a.qkv.weight"] for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()
    assert (base["a.qkv.weight"] == 1).all()


def test_an_absorbed_task_adds_nothing_and_a_missing_coefficient_is_an_error() -> None:
    base = {"a.qkv.weight": np.zeros((18, 6), np.float32)}
    factors = some_factors(1)
    both = merge(base, [Q, V], [*factors, {}], np.array([1.0, 9.0]))["a.qkv.weight"]
    np.testing.assert_array_equal(
        both, merge(base, [Q, V], factors, np.array([1.0]))["a.qkv.weight"]
    )
    with pytest.raises(ValueError, match="2 tasks"):
        merge(base, [Q, V], [*factors, {}], np.array([1.0]))


def start(classes: int = 2) -> TaskState:
    names = tuple(f"c{i}" for i in range(classes))
    return TaskState(
        0,
        "base",
        "00" * 32,
        names,
        np.zeros(0),
        np.ones((classes, 4), np.float32),
        np.zeros(classes, np.float32),
        {},
        Confidence.none(classes),
    )


@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=1), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_magnitudes_do_not_drift_however_many_packets(
    new: list[list[float]], random: object
) -> None:
    """Summing the shipped differences gives the host's magnitudes to the bit."""
    state = start()
    wanted = np.zeros(0)
    for task, (alpha,) in enumerate(new, 1):
        jitter = np.array([random.uniform(-1, 1) for _ in wanted])  # type: ignore[attr-defined]
        wanted = round_magnitudes(np.append(wanted + jitter, alpha))
        deltas = wanted - np.append(state.magnitudes, 0.0)
        rows = changed_rows(state, state.head_weight, state.head_bias)
        state = advance(state, TaskUpdate(task, "t", (), deltas, rows, {}))
        assert state.magnitudes.tobytes() == wanted.tobytes()


def test_changed_rows_are_the_new_and_the_changed_ones_and_bring_back_the_head() -> None:
    state = start(3)
    weight = np.vstack([state.head_weight, np.full((2, 4), 0.25, np.float32)])
    weight[1] = 3.5
    bias = np.array([0, 0, 0.5, 1, 2], np.float32)
    rows = changed_rows(state, weight, bias)
    assert rows.index.tolist() == [1, 2]
    assert rows.new_weight.shape == (2, 4)
    after = advance(state, TaskUpdate(1, "t", ("x", "y"), np.array([1.0]), rows, {}))
    np.testing.assert_allclose(after.head_weight, weight, atol=1e-6)
    np.testing.assert_array_equal(after.head_bias, bias)
    assert after.classes == ("c0", "c1", "c2", "x", "y")


def test_the_state_digest_covers_all_the_arithmetic_depends_on() -> None:
    state, factors = start(), some_factors(1)[0]
    rows = changed_rows(
        state, np.vstack([state.head_weight, np.zeros((1, 4), np.float32)]), np.zeros(3, np.float32)
    )
    update = TaskUpdate(1, "t", ("x",), np.array([1.0]), rows, factors)
    digest = advance(state, update).digest
    assert digest == next_digest(state.digest, update.digest())
    other_factor = {
        **factors,
        "a.q": Factors(factors["a.q"].A, np.nextafter(factors["a.q"].B, np.float16(9))),
    }
    changes = [
        TaskUpdate(1, "t", ("x",), np.array([1.0 + 2**-24]), rows, factors),
        TaskUpdate(1, "t", ("x",), np.array([1.0]), rows, other_factor),
        TaskUpdate(
            1,
            "t",
            ("x",),
            np.array([1.0]),
            replace(rows, new=rows.new + np.int8(1)),
            factors,
        ),
        TaskUpdate(
            1,
            "t",
            ("x",),
            np.array([1.0]),
            replace(rows, new_bias=rows.new_bias + np.float32(1)),
            factors,
        ),
    ]
    changes.append(replace(update, classes=("y",)))  # a name is part of a state
    assert len({digest, *(advance(state, u).digest for u in changes)}) == 6
    assert (
        advance(state, TaskUpdate(1, "another name", ("x",), np.array([1.0]), rows, factors)).digest
        == digest
    )


def task(state: TaskState, *new: str, **fields: Any) -> TaskUpdate:
    """An update that brings these classes, and else leaves the head as it is."""
    weight = np.vstack([state.head_weight, np.ones((len(new), 4), np.float32)])
    bias = np.append(state.head_bias, np.ones(len(new), np.float32)).astype(np.float32)
    rows = changed_rows(state, weight, bias, fields.get("retired", ()))
    return TaskUpdate(state.task + 1, "t", new, np.zeros(state.task + 1), rows, {}, **fields)


def test_a_retired_row_stays_in_its_place_and_is_never_the_largest() -> None:
    state = start(3)
    after = advance(state, task(state, "new", retired=(1,)))
    assert after.classes == ("c0", None, "c2", "new")
    assert (after.live, after.names) == ([0, 2, 3], ("c0", "c2", "new"))
    assert not after.head_weight[1].any()
    assert after.head_bias.tolist() == [0, np.float32(UNUSED), 0, 1]
    later = advance(after, task(after, "other"))
    assert later.classes == ("c0", None, "c2", "new", "other")
    assert later.head_bias[1] == np.float32(UNUSED)


def test_a_name_comes_back_in_the_same_task_and_names_may_be_exchanged() -> None:
    state = start(3)
    after = advance(state, task(state, "c1", retired=(1,)))
    assert after.classes == ("c0", None, "c2", "c1")
    swapped = advance(after, task(after, renamed=((0, "c2"), (2, "c0"))))
    assert swapped.classes == ("c2", None, "c0", "c1")
    taken = advance(after, task(after, "c0", renamed=((0, "c1x"),)))
    assert taken.classes == ("c1x", None, "c2", "c1", "c0")


def test_a_task_of_such_changes_alone_is_a_task_with_a_digest_of_its_own() -> None:
    state = start(3)
    updates = [
        task(state),
        task(state, retired=(1,)),
        task(state, retired=(2,)),
        task(state, renamed=((1, "x"),)),
        task(state, renamed=((1, "y"),)),
        task(state, renamed=((2, "x"),)),
    ]
    assert all(not update.factors and not len(update.head.index) for update in updates)
    states = [advance(state, update) for update in updates]
    assert len({after.digest for after in states}) == len(updates)
    assert {after.task for after in states} == {1}
    assert states[1].states == (state.digest, states[1].digest)


def test_a_retired_row_never_changes_whatever_the_new_head_holds() -> None:
    state = start(3)
    after = advance(state, task(state, retired=(1,)))
    weight, bias = np.full((3, 4), 7, np.float32), np.full(3, 5, np.float32)
    assert changed_rows(after, weight, bias).index.tolist() == [0, 2]
    assert changed_rows(state, weight, bias, (1,)).index.tolist() == [0, 2]

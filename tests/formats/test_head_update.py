"""Head rows as they travel: near, of low rank, and computed alike everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.formats.head_update import HEAD, HeadUpdate, Step

FEATURES = 192
Head = tuple[np.ndarray, np.ndarray]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def drifted(seed: int, weight: np.ndarray, size: np.ndarray, decay: float = 0.7) -> np.ndarray:
    """Rows after one drift of the features: singular values fall as in a real run."""
    random = np.random.default_rng(seed)
    U, _ = np.linalg.qr(random.standard_normal((len(weight), len(weight))))
    V, _ = np.linalg.qr(random.standard_normal((weight.shape[1], len(weight))))
    values = decay ** np.arange(len(weight))
    return (weight + (U * values) @ V.T / size).astype(np.float32)


def error(wanted: np.ndarray, found: np.ndarray, size: np.ndarray | float = 1.0) -> float:
    return float(np.linalg.norm((wanted - found) * size))


def test_steps_do_not_add_up_their_errors_over_fifty_tasks() -> None:
    """The change at hand includes what truncation and rounding lost before."""
    random = np.random.default_rng(0)
    shared = random.standard_normal((8, FEATURES))
    target = normal(1, 20, FEATURES)
    weight, bias = target.copy(), np.zeros(20, np.float32)
    for _ in range(50):
        target = (target + 0.05 * random.standard_normal((20, 8)) @ shared).astype(np.float32)
        target += 0.002 * random.standard_normal(target.shape).astype(np.float32)
        rows = HeadUpdate.between((weight, bias), (target, bias), step=Step(8))
        weight, bias = rows.applied(weight, bias)
        assert np.abs(weight - target).max() < 0.05, "one task's step is about 0.5"


@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["even features", "uneven features"])
@pytest.mark.parametrize("rank", [1, 8, 16, 24])
def test_rounding_adds_little_to_what_truncation_loses(rank: int, spread: float) -> None:
    size = np.exp(spread * normal(2, FEATURES)).astype(np.float64)
    old = normal(3, 100, FEATURES), np.zeros(100, np.float32)
    target = drifted(4, old[0], size)
    rows = HeadUpdate.between(old, (target, old[1]), step=Step(rank, metric=np.diag(size**2)))
    assert rows.left.shape == (100, rank)
    _, values, _ = np.linalg.svd((target - old[0]) * size)
    best = float(np.sqrt((values[rank:] ** 2).sum()))
    found = error(target, rows.applied(*old)[0], size)
    assert found <= 1.25 * best + 0.02 * np.linalg.norm(values)


def test_the_metric_decides_what_a_step_is_true_to() -> None:
    size = np.where(np.arange(FEATURES) < 20, 10.0, 0.1)
    old = np.zeros((60, FEATURES), np.float32), np.zeros(60, np.float32)
    target = normal(5, 60, FEATURES)
    blind, seeing = (
        HeadUpdate.between(old, (target, old[1]), step=Step(16, metric))
        for metric in (None, np.diag(size**2))
    )
    lost = [error(target, rows.applied(*old)[0], size) for rows in (blind, seeing)]
    assert lost[1] < 0.5 * lost[0]


def test_a_step_is_as_near_to_the_logits_as_its_rank_allows() -> None:
    """Of features that go together, only the direction that they share shows in logits."""
    random, mix = np.random.default_rng(22), normal(23, FEATURES, FEATURES).astype(np.float64)
    mix *= 0.9 ** np.arange(FEATURES)[:, None]
    features = random.standard_normal((5000, FEATURES)) @ mix
    old = np.zeros((30, FEATURES), np.float32), np.zeros(30, np.float32)
    target = normal(24, 30, FEATURES)
    change = features @ target.T
    _, values, _ = np.linalg.svd(change, full_matrices=False)
    best = np.sqrt((values[8:] ** 2).sum())
    lost = {}
    for name, metric in (
        ("whole", features.T @ features / 5000),
        ("sizes", np.diag((features**2).mean(axis=0))),
    ):
        rows = HeadUpdate.between(old, (target, old[1]), step=Step(8, metric))
        lost[name] = np.linalg.norm(features @ (target - rows.applied(*old)[0]).T)
    assert lost["whole"] < 1.1 * best
    assert lost["whole"] < 0.7 * lost["sizes"]


def test_the_logits_of_the_mean_feature_are_exact() -> None:
    middle = 3 * normal(6, FEATURES)
    old = normal(7, 30, FEATURES), normal(8, 30)
    target = np.vstack([old[0], np.zeros((5, FEATURES))]) + normal(9, 35, FEATURES), normal(10, 35)
    rows = HeadUpdate.between(old, target, step=Step(4, middle=middle))
    weight, bias = rows.applied(*old)
    assert error(weight, target[0]) > 1
    wanted = target[0].astype(np.float64) @ middle + target[1]
    np.testing.assert_allclose(weight.astype(np.float64) @ middle + bias, wanted, atol=1e-4)


def test_rows_that_stay_are_not_shipped() -> None:
    weight, bias = normal(11, 3, 8), np.zeros(3, np.float32)
    target = np.vstack([weight, np.ones((3, 8), np.float32)])
    rows = HeadUpdate.between((weight, bias), (target, np.array([0, 1, 0, 5, 5, 5], np.float32)))
    assert rows.index.tolist() == [1]
    assert (rows.left.shape, rows.right.shape) == ((1, 0), (0, 8))
    new_weight, new_bias = rows.applied(weight, bias)
    assert new_weight[:3].tobytes() == weight.tobytes()
    np.testing.assert_array_equal(new_weight[3:], np.ones((3, 8)))
    assert new_bias.tolist() == [0, 1, 0, 5, 5, 5]


@pytest.mark.parametrize("middle", [None, normal(12, FEATURES)], ids=["zero", "mean"])
def test_a_row_that_was_shipped_when_it_was_new_is_not_shipped_again(
    middle: np.ndarray | None,
) -> None:
    """A plain head keeps the rows that it was trained to, and a device has them rounded."""
    nothing = np.zeros((0, FEATURES), np.float32), np.zeros(0, np.float32)
    target = normal(13, 10, FEATURES), normal(14, 10)
    first = HeadUpdate.between(nothing, target, step=Step(middle=middle))
    device = first.applied(*nothing)
    assert not np.array_equal(device[0], target[0])
    other = None if middle is None else 0.5 * middle
    again = HeadUpdate.between(device, target, step=Step(middle=other))
    assert (len(again.index), len(again.right), len(again.new)) == (0, 0, 0)


def test_a_retired_row_never_changes() -> None:
    old = normal(15, 4, 8), np.zeros(4, np.float32)
    rows = HeadUpdate.between(old, (old[0] + 1, old[1] + 1), retired=(0, 2))
    assert rows.index.tolist() == [1, 3]
    assert rows.confidence.weight.shape == (0, 2)


def test_the_integer_product_is_exact_up_to_the_largest_rank() -> None:
    """2^24 is the last integer up to which float32 holds all of them."""
    left, right = np.full((1, 1024), -128, np.int8), np.full((1024, 2), -128, np.int8)
    right[:, 1] = np.resize(np.array([127, -127, 126], np.int8), 1024)
    one = np.ones(1, np.float32)
    rows = HeadUpdate(
        np.zeros((0, 2), np.int8),
        one[:0],
        one[:0],
        np.zeros(1, np.int32),
        left,
        right,
        one,
        one,
        Confidence.none(1),
    )
    exact = left.astype(np.int64) @ right.astype(np.int64)
    assert exact.max() == 2**24
    np.testing.assert_array_equal(rows.step, exact)


def test_the_tensors_name_everything_and_read_back() -> None:
    old = normal(16, 4, 8), np.zeros(4, np.float32)
    rows = HeadUpdate.between(old, (normal(17, 6, 8), normal(18, 6)))
    tensors = rows.tensors()
    assert tuple(tensors) == HEAD
    back = HeadUpdate.from_tensors(tensors)
    assert all(np.array_equal(back.tensors()[name], array) for name, array in tensors.items())
    assert rows.known_bytes == sum(
        array.nbytes for name, array in tensors.items() if name.startswith("head.old.")
    )
    del tensors["head.temperature"]
    with pytest.raises(KeyError, match="temperature"):
        HeadUpdate.from_tensors(tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    old = normal(19, 2, 8), np.zeros(2, np.float32)
    target = old[0].copy()
    target[1, 1] = value
    with pytest.raises(ValueError, match="a head row is not finite"):
        HeadUpdate.between(old, (target, old[1]))
    with pytest.raises(ValueError, match="a head row is not finite"):
        HeadUpdate.between(old, (old[0], old[1] + np.float32(value)))


def test_a_feature_that_never_varies_does_no_harm() -> None:
    old = normal(20, 40, FEATURES), np.zeros(40, np.float32)
    size = np.where(np.arange(FEATURES) % 3, 1.0, 0.0)
    target = drifted(21, old[0], np.ones(FEATURES))
    rows = HeadUpdate.between(old, (target, old[1]), step=Step(40, metric=np.diag(size**2)))
    weight, _ = rows.applied(*old)
    assert error(target, weight, size) < 0.05 * error(target, old[0], size)
    still = HeadUpdate.between(
        old, (target, old[1]), step=Step(metric=np.zeros((FEATURES, FEATURES)))
    )
    assert len(still.index) == 40

"""KD: the joint fit, its residual, and that absorbing changes no output when the residual is zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import chain, model_of, shake, small_vit

from sdlora_edge.method import absorb, backbones
from sdlora_edge.method.merged import adapted_weights
from sdlora_edge.state import Factors, merge

NAMES = ("q", "v")


def random_direction(seed: int, rank: int = 3) -> dict[str, Factors]:
    random = np.random.default_rng(seed)
    return {
        n: Factors(random.standard_normal((rank, 7)), random.standard_normal((5, rank)))
        for n in NAMES
    }


def dense(direction: dict[str, Factors]) -> np.ndarray:
    return np.concatenate([(direction[n].B @ direction[n].A).ravel() for n in NAMES])


def combined(directions: list[dict[str, Factors]], shares: list[float]) -> dict[str, Factors]:
    """sum_k c_k D_k as factors, side by side."""
    return {
        n: Factors(
            np.concatenate([d[n].A for d in directions]),
            np.concatenate([c * d[n].B for d, c in zip(directions, shares, strict=True)], axis=1),
        )
        for n in NAMES
    }


def test_the_fit_is_least_squares_over_all_projections_stacked() -> None:
    old, new = [random_direction(i) for i in range(3)], random_direction(9)
    magnitudes = np.array([2.0, -1.0, 0.5, 3.0])
    shares, residual = absorb.fit([*old, new], magnitudes)
    stacked = np.stack([dense(d) for d in old], axis=1)
    wanted = np.linalg.lstsq(stacked, dense(new), rcond=None)[0]
    np.testing.assert_allclose(shares, wanted, atol=1e-10)
    learned = stacked @ magnitudes[:-1] + magnitudes[-1] * dense(new)
    kept = stacked @ (magnitudes[:-1] + magnitudes[-1] * wanted)
    lost = np.sum((learned - kept) ** 2) / np.sum(learned**2)
    assert residual == pytest.approx(lost, abs=1e-10)
    assert 0.1 < residual < 0.9


def test_a_direction_that_hardly_counts_loses_hardly_anything() -> None:
    directions = [random_direction(i) for i in range(3)]
    large, small = (absorb.fit(directions, np.array([1.0, 1.0, a]))[1] for a in (1.0, 0.1))
    assert small < 0.02 < 0.2 < large


def test_a_combination_of_old_directions_leaves_nothing() -> None:
    old = [random_direction(i) for i in range(2)]
    shares, residual = absorb.fit([*old, combined(old, [0.5, -2.0])], np.ones(3))
    np.testing.assert_allclose(shares, [0.5, -2.0], atol=1e-9)
    assert residual == pytest.approx(0, abs=1e-9)


def test_an_absorbed_task_takes_no_part_and_the_first_task_has_nothing_to_fit_by() -> None:
    first = random_direction(1)
    shares, residual = absorb.fit([{}, first, first], np.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(shares, [0, 1], atol=1e-9)
    assert residual == pytest.approx(0, abs=1e-9)
    assert absorb.fit([first], np.ones(1))[1] == 1.0


def test_absorbing_moves_alpha_t_times_c_into_the_old_magnitudes_and_ships_no_factors() -> None:
    backbone = small_vit()
    projections, states = backbones.projections(backbone), chain(backbone, 2)
    model = model_of(backbone, states, 6)
    shake(model, 4)
    with torch.no_grad():  # the new direction IS 0.5 D_1 - 2 D_2
        for i, p in enumerate(projections):
            model.A[i].copy_(
                torch.cat([torch.from_numpy(s.factors[p.name].A).float() for s in states[1:]])
            )
            parts = [
                c * torch.from_numpy(s.factors[p.name].B).float()
                for c, s in zip((0.5, -2.0), states[1:], strict=True)
            ]
            model.B[i].copy_(torch.cat(parts, dim=1))
    model.finish_task()
    before = {name: w.detach().clone() for name, w in model.weights().items()}
    directions = [*(s.factors for s in states[1:]), model.directions()]
    shares, residual = absorb.fit(directions, model.magnitudes.detach().numpy())
    assert residual < 1e-5  # float16 factors
    model.absorb(shares)
    assert model.directions() == {}
    deltas = model.deltas()
    assert deltas[-1] == 0.0
    merged = merge(
        adapted_weights(backbone, projections),
        projections,
        [s.factors for s in states[1:]],
        states[-1].magnitudes + deltas[:-1],
    )
    for name, weight in before.items():
        np.testing.assert_allclose(merged[name], weight.numpy(), atol=2e-3)

"""The fold and its gradients are those of the formula written down naively, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdlora_edge.method.fold import Part, fold


def random_part(start: int, stop: int, old: int, rank: int, columns: int) -> Part:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    frozen = random(old, columns), random(stop - start, old)
    trained = random(rank, columns), random(stop - start, rank), random(old + rank)
    return Part(start, stop, *frozen, *(t.requires_grad_() for t in trained))


def naive(weight: Tensor, parts: list[Part]) -> Tensor:
    folded = weight.clone()
    for p in parts:
        added = torch.cat([p.old_B, p.B], dim=1) @ torch.diag(p.scale) @ torch.cat([p.old_A, p.A])
        folded[p.start : p.stop] = folded[p.start : p.stop] + added
    return folded


@pytest.mark.parametrize("old", [0, 1, 9])
def test_fold_and_its_gradients_are_those_of_the_formula(old: int) -> None:
    torch.manual_seed(old)
    weight = torch.randn(12, 5, dtype=torch.float64)
    before = weight.clone()
    parts = [random_part(0, 4, old, 3, 5), random_part(8, 12, old, 2, 5)]
    ours, expected = fold(weight, parts), naive(weight, parts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(weight, before)
    assert torch.equal(ours[4:8], weight[4:8])
    trained = [t for p in parts for t in (p.A, p.B, p.scale)]
    G = torch.randn_like(weight)
    for a, b in zip(
        *(torch.autograd.grad(out, trained, G) for out in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, dtype=torch.float64)
    part = random_part(2, 5, 4, 2, 4)
    torch.autograd.gradcheck(
        lambda A, B, scale: fold(weight, [Part(*part[:4], A, B, scale)]),
        (part.A, part.B, part.scale),
    )

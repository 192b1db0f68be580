"""Where directions and magnitudes come from, variant by variant: each against its equation written
down naively."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import chain, learned, model_of, shake, small_vit
from torch import nn

from sdlora_edge.errors import UsageError
from sdlora_edge.method import backbones
from sdlora_edge.method.authors import AuthorsSDLoRA
from sdlora_edge.method.lora import OneLoRA
from sdlora_edge.method.merged import adapted_weights
from sdlora_edge.method.sdlora import (
    FixedMagnitudes,
    Past,
    ResetMagnitudes,
    SDLoRA,
    SharedA,
    Variant,
)
from sdlora_edge.state import TaskState, advance, merge
from sdlora_edge.train.settings import Settings

IMAGES, TARGETS = (
    torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 0, 1]),
)


def grown(backbone: nn.Module, tasks: int, **variant: Any) -> list[TaskState]:
    states = chain(backbone, 0)
    for t in range(1, tasks + 1):
        model = model_of(backbone, states, **variant)
        shake(model, t)
        model.finish_task()
        states.append(advance(states[-1], learned(model, states[-1], (f"{t}a", f"{t}b"))))
    return states


def test_rank_schedule_counts_tasks_from_one() -> None:
    settings = Settings().changed(rank="10,8@4,6@8")
    assert [settings.method.rank_of(t) for t in range(1, 10)] == [10, 10, 10, 8, 8, 8, 8, 6, 6]
    backbone = small_vit()
    model = model_of(backbone, chain(backbone, 2, rank=5), 2)
    assert {tuple(A.shape) for A in model.A} == {(2, 16)}
    assert model.weights()["blocks.0.attn.qkv.weight"].shape == (48, 16)


def test_fixed_magnitudes_stay_and_the_new_one_moves() -> None:
    backbone = small_vit()
    states = chain(backbone, 2)
    model = model_of(backbone, states, magnitudes=FixedMagnitudes())
    shake(model, 3)
    (gradient,) = torch.autograd.grad(
        nn.functional.cross_entropy(model(IMAGES), TARGETS), [model.magnitudes]
    )
    assert gradient[:-1].abs().max() == 0
    assert gradient[-1] != 0


def test_the_authors_norm_divides_an_old_direction_by_both_factors_and_leaves_the_new_one() -> None:
    backbone = small_vit()
    projections = backbones.projections(backbone)
    authors = {"kind": AuthorsSDLoRA, "magnitudes": ResetMagnitudes(), "magnitude_init": 0.8}
    states = grown(backbone, 2, **authors)
    model = model_of(backbone, states, **authors)
    shake(model, 3)
    weights = {name: w.detach().numpy() for name, w in model.weights().items()}
    alpha = model.magnitudes.detach().numpy()
    for i, p in enumerate(projections):
        expected = adapted_weights(backbone, projections)[p.tensor][p.start : p.stop].copy()
        for k, state in enumerate(states[1:]):
            A, B = (
                state.factors[p.name].A.astype(np.float32),
                state.factors[p.name].B.astype(np.float32),
            )
            expected += alpha[k] * B @ A / (np.linalg.norm(A) * np.linalg.norm(B))
        expected += alpha[2] * (model.B[i] @ model.A[i]).detach().numpy()
        np.testing.assert_allclose(weights[p.tensor][p.start : p.stop], expected, atol=1e-5)
    before = [B.detach().clone() for B in model.B]
    model.finish_task()
    assert all(torch.equal(a, b) for a, b in zip(before, model.B, strict=True))
    assert model.deltas().shape == (3, 4)


def test_a_shared_A_is_that_of_the_first_task_and_frozen() -> None:
    backbone = small_vit()
    states = grown(backbone, 2, directions=SharedA())
    model = model_of(backbone, states, directions=SharedA())
    for i, p in enumerate(model.projections):
        np.testing.assert_array_equal(
            model.A[i].detach().numpy(), states[1].factors[p.name].A.astype(np.float32)
        )
        assert not model.A[i].requires_grad
        assert model.B[i].abs().max() == 0
    smaller = model_of(backbone, states, 2, directions=SharedA())
    np.testing.assert_array_equal(smaller.A[0].detach(), model.A[0][:2].detach())
    with pytest.raises(UsageError, match="rank 4"):
        model_of(backbone, states, 4, directions=SharedA())


def test_one_lora_goes_on_from_where_it_was_and_replaces_itself() -> None:
    backbone = small_vit()
    projections = backbones.projections(backbone)
    lora = {"kind": OneLoRA}
    states = grown(backbone, 2, **lora)
    assert (states[-1].magnitudes[0], len(states[-1].magnitudes)) == (0.0, 2)
    model = model_of(backbone, states, **lora)
    merged = merge(
        adapted_weights(backbone, projections),
        projections,
        [s.factors for s in states[1:]],
        states[-1].magnitudes,
    )
    for name, weight in model.weights().items():
        np.testing.assert_allclose(weight.detach().numpy(), merged[name], atol=1e-5)
    assert not model.magnitudes.requires_grad


def test_a_frozen_backbone_has_no_direction() -> None:
    backbone = small_vit()
    model = model_of(backbone, chain(backbone, 0), 0)
    torch.testing.assert_close(model(IMAGES), model.head(backbone(IMAGES)), rtol=0, atol=1e-6)
    model.finish_task()
    assert model.directions() == {}
    assert model.deltas().tolist() == [0.0]


def test_known_classes_start_from_their_rows() -> None:
    backbone = small_vit()
    head = np.full((2, 16), 0.5, np.float32), np.array([1, -1], np.float32)
    past = Past.of(backbones.projections(backbone), chain(backbone, 0))
    model = SDLoRA(backbone, past, head, Variant(3))
    np.testing.assert_array_equal(model.head.weight.detach().numpy(), head[0])
    np.testing.assert_array_equal(model.head.bias.detach().numpy(), head[1])

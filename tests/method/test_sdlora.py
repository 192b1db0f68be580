"""SD-LoRA's equation, its gradients, and what stays frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import chain, learned, model_of, shake, small_vit
from torch import Tensor, nn

from sdlora_edge.method import backbones
from sdlora_edge.method.merged import Merged, adapted_weights, logits_of
from sdlora_edge.method.sdlora import ResetMagnitudes, SDLoRA
from sdlora_edge.state import TaskState, advance, merge


def by_branches(model: SDLoRA, states: list[TaskState], images: Tensor) -> Tensor:
    """The equation written down naively, as the authors do: one low-rank branch per task beside
    each projection."""
    hooks = []
    for i, p in enumerate(model.projections):

        def branch(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, i: int = i, p: object = p
        ) -> Tensor:
            (x,) = inputs
            added = model.magnitudes[-1].double() * (x @ model.A[i].T) @ model.B[i].T
            for k, state in enumerate(states[1:]):
                f = state.factors[p.name]  # type: ignore[attr-defined]
                A, B = torch.from_numpy(f.A).double(), torch.from_numpy(f.B).double()
                added = added + model.magnitudes[k].double() * (x @ A.T) @ B.T
            return output + nn.functional.pad(added, (p.start, output.shape[-1] - p.stop))  # type: ignore[attr-defined]

        hooks.append(
            model.backbone.get_submodule(p.tensor.removesuffix(".weight")).register_forward_hook(
                branch
            )
        )
    found = model.head(model.backbone(images))
    for hook in hooks:
        hook.remove()
    return found


def test_forward_and_gradients_are_those_of_the_equation_in_float64() -> None:
    backbone = small_vit()
    states = chain(backbone, 3)
    model = model_of(backbone, states)
    shake(model, 9)
    model = model.double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, naive = model(images), by_branches(model, states, images)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-11)
    targets = torch.tensor([0, 1, 0, 1])
    gradients = [
        torch.autograd.grad(
            nn.functional.cross_entropy(out, targets), list(trained.values()), retain_graph=True
        )
        for out in (ours, naive)
    ]
    for name, a, b in zip(trained, *gradients, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert a.abs().max() > 0, name


def test_trained_are_all_magnitudes_the_new_direction_and_the_head_and_nothing_else() -> None:
    backbone = small_vit()
    model = model_of(backbone, chain(backbone, 2))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"magnitudes", "A", "B", "head"}
    assert model.magnitudes.shape == (3,)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2)  # the loss sees the new classes only


def test_finishing_a_task_changes_no_output_and_leaves_a_direction_of_norm_one() -> None:
    backbone = small_vit()
    model = model_of(backbone, chain(backbone, 2))
    shake(model, 5)
    images = torch.randn(8, 3, 8, 8)
    before = model(images)
    assert (model.norm() - 1).abs().min() > 0.05
    model.finish_task()
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    norms = [torch.linalg.matrix_norm(B @ A) ** 2 for A, B in zip(model.A, model.B, strict=True)]
    assert torch.stack(norms).mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    assert model.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_new_task_starts_where_the_old_one_ended_or_reset_as_the_authors_do() -> None:
    backbone = small_vit()
    states = chain(backbone, 2)
    projections = backbones.projections(backbone)
    carried = model_of(backbone, states)
    np.testing.assert_allclose(
        carried.magnitudes[:-1].detach().numpy(), states[-1].magnitudes, atol=1e-7
    )
    merged = merge(
        adapted_weights(backbone, projections),
        projections,
        [s.factors for s in states[1:]],
        states[-1].magnitudes,
    )
    for name, weight in carried.weights().items():
        np.testing.assert_allclose(weight.detach().numpy(), merged[name], atol=1e-5)
    reset = model_of(backbone, states, magnitudes=ResetMagnitudes(), magnitude_init=0.8)
    assert reset.magnitudes.tolist() == pytest.approx([0.8, 0.8, 0.8])


def test_what_is_shipped_computes_what_was_trained_up_to_float16() -> None:
    backbone = small_vit()
    states = chain(backbone, 2)
    projections = backbones.projections(backbone)
    model = model_of(backbone, states)
    shake(model, 7)
    model.finish_task()
    state = advance(states[-1], learned(model, states[-1], ("x", "y")))
    factors = [*(s.factors for s in states[1:]), state.factors]
    weights = merge(adapted_weights(backbone, projections), projections, factors, state.magnitudes)
    images = torch.randn(4, 3, 8, 8)
    found = logits_of(state, Merged(backbone, weights).features(images.numpy()))
    own, step = model.head.weight.detach().numpy(), state.head_weight[-2:]
    # rows are shipped in int8
    assert (np.abs(own - step) <= np.abs(own).max(axis=1, keepdims=True) / 127).all()
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(step))
    np.testing.assert_allclose(found[:, -2:], model(images).detach().numpy(), atol=5e-3)


def test_projections_are_query_and_value_of_every_block() -> None:
    found = backbones.projections(small_vit())
    assert [(p.name, p.start, p.stop, p.columns) for p in found] == [
        ("blocks.0.attn.q", 0, 16, 16),
        ("blocks.0.attn.v", 32, 48, 16),
        ("blocks.1.attn.q", 0, 16, 16),
        ("blocks.1.attn.v", 32, 48, 16),
    ]

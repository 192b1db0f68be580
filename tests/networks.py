"""Small networks and chains of task states that several tests learn with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.method import backbones
from sdlora_edge.method.sdlora import Past, SDLoRA, Variant, zero_head
from sdlora_edge.state import TaskState, TaskUpdate, advance, changed_rows


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0
    ).eval()


def model_of(
    backbone: nn.Module,
    states: list[TaskState],
    rank: int = 3,
    kind: type[SDLoRA] = SDLoRA,
    **variant: Any,
) -> SDLoRA:
    """The model of the next task, of two classes, by the backbone's default projections."""
    past = Past.of(backbones.projections(backbone), states)
    return kind(backbone, past, zero_head(2, 16), Variant(rank, **variant))


def learned(model: SDLoRA, state: TaskState, names: tuple[str, ...]) -> TaskUpdate:
    head = (
        np.concatenate([state.head_weight, model.head.weight.detach().numpy()]),
        np.concatenate([state.head_bias, model.head.bias.detach().numpy()]),
    )
    return TaskUpdate(
        state.task + 1, "t", names, model.deltas(), changed_rows(state, *head), model.directions()
    )


def chain(backbone: nn.Module, tasks: int, rank: int = 3) -> list[TaskState]:
    """States of so many tasks, each with random directions and magnitudes."""
    states = [
        TaskState(
            0,
            "base",
            "00" * 32,
            (),
            np.zeros(0),
            np.zeros((0, 16), np.float32),
            np.zeros(0, np.float32),
            {},
            Confidence.none(0),
        )
    ]
    for t in range(1, tasks + 1):
        model = model_of(backbone, states, rank)
        shake(model, t)
        model.finish_task()
        states.append(advance(states[-1], learned(model, states[-1], (f"{t}a", f"{t}b"))))
    return states


@torch.no_grad()
def shake(model: SDLoRA, seed: int) -> None:
    """Stands for training: every trained number moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)

"""Small networks and chains of task states that several tests learn with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from timm.models import beit, convnext, efficientnet, eva, resnet, swin_transformer
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


def every_kind() -> dict[str, Callable[[], nn.Module]]:
    """A small random backbone of each family whose blocks the head can see, for 32 px."""
    vit: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0,
    }  # fmt: skip
    rope = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    kinds: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: VisionTransformer(**vit),
        "gap": lambda: VisionTransformer(**vit, global_pool="avg", class_token=False),
        "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **vit),
        "dinov2": lambda: VisionTransformer(
            **vit, init_values=1.0, reg_tokens=2, no_embed_class=True
        ),
        "eva": lambda: eva.Eva(**vit, **rope, use_fc_norm=False),
        "beit": lambda: beit.Beit(**vit),
        "swin": lambda: swin_transformer.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=0
        ),
        "convnext": lambda: convnext.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(8, 8, 12, 16), ls_init_value=None, num_classes=0
        ),
        "efficientnet": lambda: efficientnet._gen_efficientnet_lite(
            "efficientnet_lite0", channel_multiplier=0.25, num_classes=0
        ),
        "mobilenet": lambda: timm.create_model("mobilenetv4_conv_small_035", num_classes=0),
        "resnet": lambda: resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=0),
        "regnet": lambda: timm.create_model("regnety_002", num_classes=0),
    }  # fmt: skip

    def made(build: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        return model

    return {name: partial(made, build) for name, build in kinds.items()}

"""Modules of a backbone as its own library and `peft` call them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import timm
import torch
from torch import nn

from ..method import backbones
from ..method.encoders import INNER

log = logging.getLogger("sdlora_edge")
CLASSIFIERS = {"classifier", "score"}
"""modules that `transformers` puts a head into, and that peft saves by itself with SEQ_CLS"""


def module_of(tensor: str) -> str:
    """The module of an adapted weight, as its own library calls it."""
    return tensor.removeprefix(INNER).removesuffix(".weight")


def classifier_of(model: str) -> str | None:
    """The module that timm puts the head into; None if there is no single one."""
    found = (
        "head"
        if model == backbones.MICRO
        else timm.models.get_pretrained_cfg_value(model, "classifier")
    )
    if not isinstance(found, str):
        log.warning(
            "timm's %s has no single classifier (%s): the adapter is written without the head",
            model,
            found,
        )
        return None
    return found


@torch.no_grad()
def warn_of_bypassed(backbone: nn.Module, modules: Sequence[str], size: int | None) -> None:
    """Name the modules whose weight the backbone reads without calling them.

    It would not call an adapter beside them either.
    """
    called: set[str] = set()
    hooks = [
        backbone.get_submodule(m).register_forward_hook(lambda *_, name=m: called.add(name))
        for m in modules
    ]
    backbone(torch.zeros(1, 3, size, size))  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    for module in modules:
        if module not in called:
            log.warning(
                "timm reads %s.weight without calling the layer: in peft, call merge_and_unload(), "
                "or the adapter has no effect there",
                module,
            )

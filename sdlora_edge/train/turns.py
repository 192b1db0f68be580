"""Turned images as classes of their own, while a task is trained.

A task has few classes, so the cross-entropy asks for few features: enough to tell these classes
apart, not those that earlier and later tasks need. With a class for each of four turns of each
class (0, 90, 180 and 270 degrees) it asks for more, at no cost a step. The rows of turned classes
are thrown away after the task. It is the class augmentation of PASS (Zhu et al., CVPR 2021), but
every step shows as many images as without: a share of them is turned, instead of four of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..method.sdlora import SDLoRA

TURNS = 4


def draw_turns(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw how many quarters each of `count` images is turned by: int64 (count,), 0 to 3.

    share: of images that are turned, each way alike. A share of 0 draws nothing.
    """
    if not share:
        return torch.zeros(count, dtype=torch.int64)
    turned = torch.rand(count, generator=generator) < share
    return torch.randint(1, TURNS, (count,), generator=generator) * turned


def turn(
    pixels: np.ndarray, targets: Tensor, quarters: Tensor, classes: int
) -> tuple[np.ndarray, Tensor]:
    """Turn square images counterclockwise, and give each turned one the class of its turn.

    Args:
        pixels: uint8 (n, S, S, 3).
        targets: int64 (n,), in [0, classes).
        quarters: What `draw_turns` returns, (n,).
        classes: Classes of the task.

    Returns:
        (pixels, targets) of the same shapes; targets are in [0, 4 classes), turn by turn.
    """
    if not quarters.any():
        return pixels, targets
    turned = [np.rot90(image, int(k)) for image, k in zip(pixels, quarters, strict=True)]
    return np.stack(turned), targets + quarters * classes


@contextmanager
def rows_for_turns(model: SDLoRA) -> Iterator[None]:
    """Give the head of a model rows for the turned classes; take them away in the end.

    They start at zero.
    """
    with torch.no_grad():
        head, classes = model.head, len(model.head.weight)
        model.head = nn.Linear(head.in_features, TURNS * classes).to(head.weight)
        for wide, own in zip(model.head.parameters(), head.parameters(), strict=True):
            wide.zero_()
            wide[:classes] = own
    try:
        yield
    finally:
        with torch.no_grad():
            for wide, own in zip(model.head.parameters(), head.parameters(), strict=True):
                own.copy_(wide[:classes])
        model.head = head

"""W = W_0 + B diag(s) A in one operation, whose backward pass computes only what is trained.

Old factors are frozen and only their magnitudes are trained. Plain autograd over the factors of all
tasks side by side would contract G = dL/dW with every old A and every old B. The magnitudes need
only one of the two: ds_j = <B_j, G A_j> = (B^T G)_j . A_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Part(NamedTuple):
    """What is added to rows [start, stop) of a weight: old_B diag(s) old_A + B diag(s) A.

    old_A: (R, columns) and old_B: (rows, R) are frozen. A: (r, columns) and B: (rows, r) are
    trained. scale: s, (R + r,), trained; those of the old directions come first.
    """

    start: int
    stop: int
    old_A: Tensor
    old_B: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor


def fold(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return a new tensor, the frozen weight with every part added.

    It is differentiable in each part's A, B and scale.
    """
    tensors = [tensor for part in parts for tensor in part[2:]]
    folded: Tensor = _Fold.apply(weight, [part[:2] for part in parts], *tensors)
    return folded


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(*tensors)
        folded = weight.clone()
        for (start, stop), (old_A, old_B, A, B, scale) in zip(rows, _fives(tensors), strict=True):
            old, new = scale.split([len(old_A), len(A)])
            folded[start:stop].addmm_(old_B * old, old_A).addmm_(B * new, A)
        return folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None, None]
        for (start, stop), (old_A, old_B, A, B, scale) in zip(
            ctx.rows, _fives(ctx.saved_tensors), strict=True
        ):
            G, new = gradient[start:stop], scale[len(old_A) :]
            on_A = B.T @ G
            on_scale = torch.cat([((old_B.T @ G) * old_A).sum(1), (on_A * A).sum(1)])
            found += [None, None, new[:, None] * on_A, (G @ A.T) * new, on_scale]
        return tuple(found)


def _fives(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [tensors[i : i + 5] for i in range(0, len(tensors), 5)]

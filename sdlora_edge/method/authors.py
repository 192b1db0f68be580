"""SD-LoRA as the authors' code (WuYichen-97/SD-Lora-CL) computes it, for comparison. It differs
from the paper.

    old k < t:     W gets alpha_k B_k A_k / ( ||A_k||_F ||B_k||_F )
    the new one:   W gets alpha_t B_t A_t, without a norm

Two things differ. The norm is that of the two factors, not of their product; and the new direction
is divided only when it is old, so the function jumps between two tasks. The code also resets all
magnitudes at each task (`ResetMagnitudes`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .sdlora import Head, Past, SDLoRA, Variant


class AuthorsSDLoRA(SDLoRA):
    """The same arguments as `SDLoRA`.

    What is shipped as a magnitude is alpha_k / ( ||A_k||_F ||B_k||_F ), a number of each
    projection: (t, P).
    """

    unit: Tensor
    """1 / ( ||A_k||_F ||B_k||_F ) of old directions, 1 for the new one: (t, P)"""

    def __init__(self, backbone: nn.Module, past: Past, head: Head, variant: Variant) -> None:
        super().__init__(backbone, past, head, variant)
        unit = np.ones((past.tasks, len(self.projections)), np.float32)
        for i, p in enumerate(self.projections):
            for k, f in past.factors_of(p.name).items():
                unit[k, i] = 1 / max(1e-12, _length(f.A) * _length(f.B))
        self.register_buffer("unit", torch.from_numpy(unit), persistent=False)

    def _stored_shape(self, tasks: int) -> tuple[int, ...]:
        return tasks, len(self.projections)

    def _first_magnitudes(self) -> np.ndarray:
        # One alpha_k for all projections. Its last value is not stored, so it always starts again.
        return np.full(len(self._before), self.variant.magnitude_init)

    def coefficients(self) -> Tensor:
        return self.unit * super().coefficients()

    def finish_task(self) -> None:
        """Nothing: the new direction is divided by its norm when the next task begins."""

    def _stored(self) -> Tensor:
        return self.coefficients()


def _length(factor: np.ndarray) -> float:
    return float(np.linalg.norm(factor.astype(np.float64)))

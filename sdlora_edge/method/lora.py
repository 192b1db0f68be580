"""One LoRA that is trained on and on, a baseline:

D_t goes on from alpha_{t-1} D_{t-1}, which it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..formats.encoding import Factors
from ..state import Projection
from .sdlora import SDLoRA, first_rows


class OneLoRA(SDLoRA):
    """The same arguments as `SDLoRA`.

    No magnitude is trained: alpha_t stays at its first value, old ones become 0.
    """

    trains_magnitudes = False

    def _start(self, p: Projection, old: Mapping[int, Factors]) -> tuple[Tensor, Tensor, bool]:
        if not (self.rank and old):
            return super()._start(p, old)
        last = old[max(old)]
        B = torch.from_numpy(last.B[:, : self.rank].astype(np.float32))
        alpha = float(self._before[max(old)]) / self.variant.magnitude_init
        return first_rows(last.A, self.rank), B * alpha, True

    def _summed(self, old: Mapping[int, Factors]) -> Mapping[int, Factors]:
        return {}

    def _first_magnitudes(self) -> np.ndarray:
        return np.zeros_like(self._before)

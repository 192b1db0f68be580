"""`sdlora-edge` with EWC on the adapted weights: a row of the evidence table, not a part of the package.

`python tests/bench/ewc.py train ...` takes the same arguments. After each task the Fisher information of W is measured on its
images, and while a later task is trained the loss gets (Kirkpatrick et al., PNAS 2017, with W = W_0 + BA as in EWC-LoRA)

    strength * sum_i F_i (W - W_{t-1})_i^2 / sum_i W0_i^2,   F: mean over tasks, scaled so that its own mean is 1

The environment variable EWC_STRENGTH sets the strength. A stream is trained in one process: F is not stored.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sdlora_edge.__main__ import main
from sdlora_edge.train import fit

STRENGTH = float(os.environ.get("EWC_STRENGTH", "300"))
IMAGES = 200
fisher: dict[str, Tensor] = {}


class Penalised(fit._Fitting):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.anchor = {name: w.detach().clone() for name, w in self.model.weights().items()}

    def run(self) -> list[float]:
        losses = super().run()
        for name, squares in self._squares().items():
            fisher[name] = fisher.get(name, torch.zeros(())) + squares
        return losses

    def _backward(self, share: Any, batch: int) -> Tensor:
        found = super()._backward(share, batch)
        if fisher:
            mean = sum(float(f.mean()) for f in fisher.values()) / len(fisher)
            whole = sum(float(w.square().sum()) for w in self.anchor.values())
            moved = ((fisher[n] * (w - self.anchor[n]) ** 2).sum() for n, w in self.model.weights().items())  # fmt: skip
            penalty: Tensor = sum(moved, torch.zeros(())) * STRENGTH / mean / whole
            penalty.backward()
        return found

    def _squares(self) -> dict[str, Tensor]:
        """The mean square of each weight's gradient over images of the task, each with its own class."""
        weights = {n: w.detach().requires_grad_() for n, w in self.model.weights().items()}
        chosen = torch.randperm(len(self.images), generator=self.order)[:IMAGES]
        (pixels,) = self.images.batches([chosen.numpy()])
        targets = torch.from_numpy(self.images.targets)[chosen]
        squares = {name: torch.zeros_like(w) for name, w in weights.items()}
        alone = zip(*(array.split(1) for array in self.upload(pixels)), strict=True)
        for item, target in zip(alone, targets.split(1), strict=True):
            seen = functional_call(self.model.backbone, weights, item)
            loss = nn.functional.cross_entropy(self.model.head(seen), target)
            grads = torch.autograd.grad(loss, list(weights.values()))
            for square, grad in zip(squares.values(), grads, strict=True):
                square += grad.square() / len(targets)
        return squares


fit._Fitting = Penalised  # type: ignore[misc]
if __name__ == "__main__":
    sys.exit(main())

"""SD-LoRA (Wu et al., ICLR 2025): old directions frozen, all magnitudes learned again.

    W_t = W_0 + sum_{k<=t} alpha_k D_k        D_k = B_k A_k / N_k        N_k = rms over projections of ||B_k A_k||_F

alpha_k is one scalar shared by all projections, so the norm is one number too: then it can move from B into alpha without
changing any output. The current direction is trained as it is (N_t = 1, B_t starting at zero); `finish_task` sets
alpha_t <- alpha_t N_t and B_t <- B_t / N_t. With one projection this is the paper's D = BA / ||BA||_F.

Each step folds the sum into the weights before the forward pass, W = W_0 + B diag(s) A with the factors of all tasks side by
side, so a step is that of the plain backbone plus one small product per projection, whatever the number of tasks; autograd
contracts the weight's gradient G = dL/dW the same way (dB = G A^T s, dA = s B^T G, dalpha_k = <B_k^T G, A_k>).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..packet import encode
from ..state import Factors, Projection, TaskState, round_magnitudes
from .backbones import shaped


class SDLoRA(nn.Module):
    """A frozen backbone, the frozen directions of the tasks so far, and the new task being learned.

    backbone: pictures (N, 3, H, W) to features (N, features); its parameters are frozen here. states: of the tasks so far,
    first to last (task 0 included). classes: number of new classes. rank: of the new direction. magnitudes: "carry" goes on
    from the last ones, "reset" starts every one at `magnitude_init` (the authors' code).
    """

    def __init__(
        self,
        backbone: nn.Module,
        projections: Sequence[Projection],
        states: Sequence[TaskState],
        classes: int,
        rank: int,
        magnitudes: str = "carry",
        magnitude_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.projections = tuple(projections)
        self._states = tuple(states)
        old = states[-1].magnitudes if magnitudes == "carry" else np.full(len(states) - 1, magnitude_init)
        self.magnitudes = nn.Parameter(torch.tensor([*old, magnitude_init], dtype=torch.float32))  # (t,)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()  # the new direction
        self.old_A, self.old_B = nn.ParameterList(), nn.ParameterList()  # frozen: all old ones, concatenated over tasks
        self.owners: list[Tensor] = []  # for each column of B and row of A, which magnitude it goes with
        weights = dict(backbone.named_parameters())
        for p in self.projections:
            like = weights[p.tensor]
            rows = p.stop - p.start
            A = torch.empty(rank, p.columns, dtype=like.dtype, device=like.device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            self.A.append(nn.Parameter(A))
            self.B.append(nn.Parameter(torch.zeros(rows, rank, dtype=like.dtype, device=like.device)))
            parts = [(k, s.factors[p.name]) for k, s in enumerate(states[1:]) if p.name in s.factors]
            old_A = np.concatenate([np.zeros((0, p.columns), np.float32), *(f.A.astype(np.float32) for _, f in parts)])
            old_B = np.concatenate([np.zeros((rows, 0), np.float32), *(f.B.astype(np.float32) for _, f in parts)], axis=1)
            self.old_A.append(nn.Parameter(torch.from_numpy(old_A).to(like), requires_grad=False))
            self.old_B.append(nn.Parameter(torch.from_numpy(old_B).to(like), requires_grad=False))
            owner = [k for k, f in parts for _ in range(len(f.A))] + [len(states) - 1] * rank
            self.owners.append(torch.tensor(owner, device=like.device))
        features = states[-1].head_weight.shape[1]
        self.head = nn.Linear(features, classes)
        nn.init.zeros_(self.head.weight)  # no random logits: at 14 pictures a class they never quite go away
        nn.init.zeros_(self.head.bias)

    def weights(self) -> dict[str, Tensor]:
        """Every adapted weight, folded: W_0 + B diag(s) A, differentiable in A_t, B_t and all magnitudes."""
        folded = {p.tensor: self.backbone.get_parameter(p.tensor).flatten(1).clone() for p in self.projections}
        for i, p in enumerate(self.projections):
            scale = self.magnitudes[self.owners[i]]  # (sum of ranks,)
            B = torch.cat([self.old_B[i], self.B[i]], dim=1)  # (rows, sum of ranks)
            A = torch.cat([self.old_A[i], self.A[i]])  # (sum of ranks, columns)
            folded[p.tensor][p.start : p.stop] += (B * scale) @ A
        return shaped(self.backbone, folded)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the new task's classes only, (N, classes): the loss never sees another task's row."""
        return self.head(functional_call(self.backbone, self.weights(), (pictures,)))

    @torch.no_grad()
    def norm(self) -> float:
        """N_t of the direction being learned; r x r products only: ||BA||_F^2 = sum( (B^T B) * (A A^T) )."""
        squares = [((B.T @ B) * (A @ A.T)).sum().item() for A, B in zip(self.A, self.B, strict=True)]
        return math.sqrt(max(0.0, sum(squares) / len(squares)))

    @torch.no_grad()
    def finish_task(self) -> None:
        """Normalise the new direction: its norm moves from B_t into alpha_t, and no output changes."""
        if (norm := self.norm()) > 0:
            self.magnitudes[-1] *= norm
            for B in self.B:
                B /= norm

    def directions(self) -> dict[str, Factors]:
        """The finished direction as it is shipped, float16."""
        parts = zip(self.projections, self.A, self.B, strict=True)
        return {p.name: Factors(encode(_numpy(A)), encode(_numpy(B))) for p, A, B in parts}

    def deltas(self) -> np.ndarray:
        """float64 (t,): every magnitude's exact difference to the state before, the new one's whole value last."""
        magnitudes = round_magnitudes(_numpy(self.magnitudes).astype(np.float64))
        return magnitudes - np.append(self._states[-1].magnitudes, 0.0)


def adapted_weights(backbone: nn.Module, projections: Sequence[Projection]) -> dict[str, np.ndarray]:
    """W_0 of every adapted weight, float32 numpy (rows, columns)."""
    return {p.tensor: _numpy(backbone.get_parameter(p.tensor).flatten(1)).astype(np.float32) for p in projections}


@torch.no_grad()
def features(backbone: nn.Module, weights: Mapping[str, np.ndarray], inputs: np.ndarray, exact: bool = False) -> np.ndarray:
    """What the head sees under merged weights: inputs float32 (N, 3, H, W) to (N, features), float32, or float64 if `exact`."""
    device = next(backbone.parameters()).device
    dtype = torch.float64 if exact else torch.float32
    backbone.eval()
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())} if exact else {}
    tensors |= shaped(backbone, {name: torch.from_numpy(weight) for name, weight in weights.items()})
    tensors = {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}
    return _numpy(functional_call(backbone, tensors, (torch.from_numpy(inputs).to(device, dtype),)))


def logits(
    backbone: nn.Module, weights: Mapping[str, np.ndarray], state: TaskState, inputs: np.ndarray, exact: bool = False
) -> np.ndarray:
    """What the host gets: inputs float32 (N, 3, H, W) to logits float32 (N, classes).

    exact: compute in float64, so that what a device differs by is its own rounding alone. (Measured on ViT-Tiny with logits up
    to 48: ONNX Runtime and torch in float32 are each up to 1e-4 and 1.5e-4 away from it.)
    """
    seen = features(backbone, weights, inputs, exact)
    head = state.head_weight.astype(seen.dtype), state.head_bias.astype(seen.dtype)
    return (seen @ head[0].T + head[1]).astype(np.float32)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

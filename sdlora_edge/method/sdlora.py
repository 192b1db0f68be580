"""SD-LoRA (Wu et al., ICLR 2025): old directions frozen, all magnitudes learned again.

    W_t = W_0 + sum_{k<=t} alpha_k D_k        D_k = B_k A_k / N_k        N_k = rms over projections of ||B_k A_k||_F

alpha_k is one scalar shared by all projections, so the norm is one number too: then it can move from B into alpha without
changing any output. The current direction is trained as it is (N_t = 1, B_t starting at zero); `finish_task` sets
alpha_t <- alpha_t N_t and B_t <- B_t / N_t. With one projection this is the paper's D = BA / ||BA||_F. With
`magnitude_scope="projection"` alpha_k and N_k are numbers of each projection instead.

Each step folds the sum into the weights before the forward pass, W = W_0 + B diag(s) A with the factors of all tasks side by
side, so a step is that of the plain backbone plus one small product per projection, whatever the number of tasks; `fold`
contracts the weight's gradient G = dL/dW the same way (dB = G A^T s, dA = s B^T G, dalpha_k = <B_k^T G, A_k>).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UsageError
from ..formats.encoding import DEFAULT, Factors, encode
from ..state import Projection, TaskState, extended, round_magnitudes
from .backbones import shaped
from .fold import Part, fold


class SDLoRA(nn.Module):
    """A frozen backbone, the frozen directions of the tasks so far, and the new task being learned.

    backbone: images (N, 3, H, W) to features (N, features); its parameters are frozen here. states: of the tasks so far,
    first to last (task 0 included). classes: of the new task. rank: of the new direction; 0 for none (a frozen backbone).
    head: (weight, bias) to start from, float32 (classes, features), (classes,); zeros by default: no random logits, which at
    14 images a class never quite go away.

    directions     where A_t comes from. "free": random. "shared": A_t = A_1, frozen, so all tasks' sum has rank r.
                   (B_t starts at zero, so each starts as the model before.)
                   "continue": D_t goes on from alpha_{t-1} D_{t-1}, which it replaces: one LoRA trained on and on.
    magnitudes     of old tasks, when a new one begins. "carry": go on from the last ones; "reset": every one starts at
                   magnitude_init (the authors' code); "fixed": as they are, not trained; "none": no magnitude is trained.
    magnitude_norm "direction": N_k above. "factors": the authors' code, alpha_k B_k A_k / ( ||A_k||_F ||B_k||_F ) once a
                   direction is old, but alpha_t B_t A_t while it is trained, so the function jumps between tasks.
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
        magnitude_scope: str = "shared",
        magnitude_norm: str = "direction",
        directions: str = "free",
        head: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.projections = tuple(projections)
        self.rank, self.frozen_magnitudes = rank, magnitudes in ("fixed", "none")
        self.per_projection, self.by_factors = (
            magnitude_scope == "projection",
            magnitude_norm == "factors",
        )
        tasks, width = len(states), len(self.projections)
        shape = (tasks, width) if self.per_projection or self.by_factors else (tasks,)
        self._before = extended(
            states[-1].magnitudes, np.zeros(shape)
        )  # as stored: (t,) or (t, projections)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()  # the new direction
        self.old_A, self.old_B = (
            nn.ParameterList(),
            nn.ParameterList(),
        )  # frozen: all old ones, concatenated over tasks
        self.owners: list[
            Tensor
        ] = []  # for each column of B and row of A, which magnitude it goes with
        unit = np.ones(
            (tasks, width), np.float32
        )  # what a magnitude is multiplied with: 1 / N_k where the factors carry N_k
        weights = dict(backbone.named_parameters())
        for i, p in enumerate(self.projections):
            like, rows = weights[p.tensor], p.stop - p.start
            old = {k: s.factors[p.name] for k, s in enumerate(states[1:]) if p.name in s.factors}
            A, B = _new_factors(directions, rank, rows, p.columns, list(old.values()))
            if directions == "continue" and old:
                B = B * float(self._before[max(old)]) / magnitude_init
                old = {}
            if self.by_factors:
                unit[list(old), i] = [
                    1 / max(1e-12, _length(f.A) * _length(f.B)) for f in old.values()
                ]
            old_A = np.concatenate(
                [
                    np.zeros((0, p.columns), np.float32),
                    *(f.A.astype(np.float32) for f in old.values()),
                ]
            )
            old_B = np.concatenate(
                [np.zeros((rows, 0), np.float32), *(f.B.astype(np.float32) for f in old.values())],
                axis=1,
            )
            self.A.append(
                nn.Parameter(A.to(like), requires_grad=not (directions == "shared" and old))
            )
            self.B.append(nn.Parameter(B.to(like)))
            self.old_A.append(nn.Parameter(torch.from_numpy(old_A).to(like), requires_grad=False))
            self.old_B.append(nn.Parameter(torch.from_numpy(old_B).to(like), requires_grad=False))
            owner = [k for k, f in old.items() for _ in range(len(f.A))] + [tasks - 1] * rank
            self.owners.append(torch.tensor(owner, dtype=torch.int64, device=like.device))
        begin = (
            self._before.copy() if self.per_projection or not self.by_factors else np.zeros(tasks)
        )
        begin[:-1] = (
            magnitude_init
            if magnitudes == "reset"
            else 0.0
            if directions == "continue"
            else begin[:-1]
        )
        begin[-1] = magnitude_init if rank else 0.0
        self.magnitudes = nn.Parameter(
            torch.tensor(begin, dtype=torch.float32),
            requires_grad=magnitudes != "none" and rank > 0,
        )
        self.unit: Tensor
        self.register_buffer("unit", torch.from_numpy(unit), persistent=False)
        self.head = nn.Linear(states[-1].head_weight.shape[1], classes)
        with torch.no_grad():
            self.head.weight.zero_() if head is None else self.head.weight.copy_(
                torch.from_numpy(head[0])
            )
            self.head.bias.zero_() if head is None else self.head.bias.copy_(
                torch.from_numpy(head[1])
            )

    def coefficients(self) -> Tensor:
        """What each D_k (as its factors stand) is multiplied with in each projection, (t, projections)."""
        own = (
            torch.cat([self.magnitudes[:-1].detach(), self.magnitudes[-1:]])
            if self.frozen_magnitudes
            else self.magnitudes
        )
        return self.unit * (own if self.per_projection else own[:, None])

    def weights(self) -> dict[str, Tensor]:
        """Every adapted weight, folded: W_0 + B diag(s) A, differentiable in A_t, B_t and all magnitudes; never in half precision."""
        parts: dict[str, list[Part]] = {}
        with torch.autocast(self.magnitudes.device.type, enabled=False):
            coefficients = self.coefficients()
            for i, p in enumerate(self.projections):
                factors = self.old_A[i], self.old_B[i], self.A[i], self.B[i]
                scale = coefficients[self.owners[i], i]  # (sum of ranks,)
                parts.setdefault(p.tensor, []).append(Part(p.start, p.stop, *factors, scale))
            folded = {
                name: fold(self.backbone.get_parameter(name).flatten(1), own)
                for name, own in parts.items()
            }
        return shaped(self.backbone, folded)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the new task's classes only, (N, classes), never in half precision: the loss never sees another task's row."""
        seen = functional_call(self.backbone, self.weights(), (images,)).to(self.head.weight.dtype)
        with torch.autocast(seen.device.type, enabled=False):
            found: Tensor = self.head(seen)
        return found

    @torch.no_grad()
    def norm(self) -> Tensor:
        """N_t of the direction being learned, for each projection (equal where alpha is shared), (projections,).

        r x r products only: ||BA||_F^2 = sum( (B^T B) * (A A^T) ).
        """
        squares = torch.stack(
            [((B.T @ B) * (A @ A.T)).sum() for A, B in zip(self.A, self.B, strict=True)]
        ).clamp(min=0)
        return (squares if self.per_projection else squares.mean().expand_as(squares)).sqrt()

    @torch.no_grad()
    def finish_task(self) -> None:
        """Normalise the new direction: its norm moves from B_t into alpha_t, and no output changes."""
        if self.by_factors or not self.rank:
            return
        norm = self.norm()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.magnitudes[-1] *= norm if self.per_projection else norm[0]
        for B, N in zip(self.B, norm, strict=True):
            B /= N

    @torch.no_grad()
    def absorb(self, shares: np.ndarray) -> None:
        """KD: drop the finished direction, alpha_k += alpha_t c_k. shares: c, float64 (t-1,), of `absorb.fit`."""
        c = torch.from_numpy(shares).to(self.magnitudes)
        self.magnitudes[:-1] += self.magnitudes[-1] * (c[:, None] if self.per_projection else c)
        self.magnitudes[-1] = 0.0
        self.rank = 0

    def directions(self, encoding: str = DEFAULT) -> dict[str, Factors]:
        """The finished direction as it is shipped in an encoding; nothing where it was absorbed."""
        parts = zip(self.projections, self.A, self.B, strict=True)
        return {
            p.name: encode(Factors(_numpy(A), _numpy(B)), encoding)
            for p, A, B in parts
            if self.rank
        }

    def deltas(self) -> np.ndarray:
        """float64 (t,) or (t, projections): every magnitude's exact difference to the state before, the new one's value last."""
        stored = (
            self.magnitudes
            if self._before.ndim == 1 or self.per_projection
            else self.coefficients()
        )
        found: np.ndarray = round_magnitudes(_numpy(stored).astype(np.float64)) - self._before
        return found


def _length(factor: np.ndarray) -> float:
    return float(np.linalg.norm(factor.astype(np.float64)))


def _new_factors(
    directions: str, rank: int, rows: int, columns: int, old: Sequence[Factors]
) -> tuple[Tensor, Tensor]:
    """(A (rank, columns), B (rows, rank)), float32, from which a direction starts."""
    last = old[-1] if old else None
    A, B = torch.zeros(rank, columns), torch.zeros(rows, rank)
    if rank and (last is None or directions == "free"):
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    elif rank and last is not None:  # "shared", "continue"
        if len(last.A) < rank:
            raise UsageError(
                f"rank {rank} is more than the {len(last.A)} of the direction that it goes on from"
            )
        A = torch.from_numpy(last.A[:rank].astype(np.float32))
        B = torch.from_numpy(last.B[:, :rank].astype(np.float32)) if directions == "continue" else B
    return A, B


def adapted_weights(
    backbone: nn.Module, projections: Sequence[Projection]
) -> dict[str, np.ndarray]:
    """W_0 of every adapted weight, float32 numpy (rows, columns)."""
    return {
        p.tensor: _numpy(backbone.get_parameter(p.tensor).flatten(1)).astype(np.float32)
        for p in projections
    }


@torch.no_grad()
def features(
    backbone: nn.Module, weights: Mapping[str, np.ndarray], inputs: np.ndarray, exact: bool = False
) -> np.ndarray:
    """What the head sees under merged weights: inputs float32 (N, 3, H, W) to (N, features), float32, or float64 if `exact`."""
    device = next(backbone.parameters()).device
    dtype = torch.float64 if exact else torch.float32
    backbone.eval()
    tensors = (
        {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())} if exact else {}
    )
    tensors |= shaped(
        backbone, {name: torch.from_numpy(weight) for name, weight in weights.items()}
    )
    tensors = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    return _numpy(
        functional_call(backbone, tensors, (torch.from_numpy(inputs).to(device, dtype),)).to(dtype)
    )


def logits(
    backbone: nn.Module,
    weights: Mapping[str, np.ndarray],
    state: TaskState,
    inputs: np.ndarray,
    exact: bool = False,
) -> np.ndarray:
    """What the host gets: inputs float32 (N, 3, H, W) to logits float32 (N, classes).

    exact: compute in float64, so that what a device differs by is its own rounding alone. (Measured on ViT-Tiny with logits up
    to 48: ONNX Runtime and torch in float32 are each up to 1e-4 and 1.5e-4 away from it.)
    """
    seen = features(backbone, weights, inputs, exact)
    head = state.head_weight.astype(seen.dtype), state.head_bias.astype(seen.dtype)
    found: np.ndarray = (seen @ head[0].T + head[1]).astype(np.float32)
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

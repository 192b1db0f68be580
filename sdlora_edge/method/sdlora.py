"""SD-LoRA (Wu et al., ICLR 2025, arXiv 2501.13198): directions are frozen, and all magnitudes are
learned again.

    W_t = W_0 + sum_{k<=t} alpha_k D_k
    D_k = B_k A_k / N_k        N_k = rms over projections of ||B_k A_k||_F

One alpha_k serves all projections, so N_k is one number too. Therefore the norm can move from B_k
into alpha_k, and no output changes. The current direction is trained without its norm (N_t = 1, B_t
starts at zero). `finish_task` then sets alpha_t <- alpha_t N_t and B_t <- B_t / N_t. With one
projection this is the paper's D = BA / ||BA||_F.

Each step folds the sum into the weights before the forward pass: W = W_0 + B diag(s) A, with the
factors of all tasks side by side. A step costs what the plain backbone costs plus one small product
for each projection, whatever the number of tasks. The backward pass contracts the weight's gradient
G = dL/dW the same way (`fold`): dB = G A^T s, dA = s B^T G, dalpha_k = <B_k^T G, A_k>.

Other algorithms are subclasses: `authors.AuthorsSDLoRA` and `lora.OneLoRA`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..formats.encoding import DEFAULT, Factors, encode
from ..state import Projection, TaskState, extended, round_magnitudes
from .backbones import shaped
from .features import last_under
from .fold import Part, fold

Head = tuple[np.ndarray, np.ndarray]
"""weight float32 (classes, features), bias float32 (classes,)"""


class Directions:
    """Where A_t comes from. Here, as in the paper: it is random (Kaiming uniform) and trained.

    B_t starts at zero in every variant, so a task starts with the function of the model before it.
    """

    def start(self, rank: int, columns: int, old: Sequence[Factors]) -> tuple[Tensor, bool]:
        """Return (A_t float32 (rank, columns), whether A_t is trained).

        old: the projection's factors so far, first to last.
        """
        A = torch.zeros(rank, columns)
        if rank:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return A, True


class SharedA(Directions):
    """A_t = A_1, frozen.

    The sum over all tasks then has rank r, so old directions can reproduce a new one (KD).
    """

    def start(self, rank: int, columns: int, old: Sequence[Factors]) -> tuple[Tensor, bool]:
        if not (rank and old):
            return super().start(rank, columns, old)
        return first_rows(old[-1].A, rank), False


class Magnitudes:
    """The old magnitudes when a task begins.

    Here, as in the paper: their last values, which are trained on.
    """

    trained = True

    def start(self, last: np.ndarray, first: float) -> np.ndarray:
        """Return the old magnitudes to start from, float64.

        last: their values after the task before. first: the value that a new magnitude starts with.
        """
        return last


class ResetMagnitudes(Magnitudes):
    """Each starts again with the first value, as in the authors' code."""

    def start(self, last: np.ndarray, first: float) -> np.ndarray:
        return np.full_like(last, first)


class FixedMagnitudes(Magnitudes):
    """They keep their last values and are not trained (the paper's ablation)."""

    trained = False


@dataclass(frozen=True)
class Variant:
    """What a new task starts from.

    rank: r of the new direction; 0 trains the head alone. magnitude_init: alpha_t before training.
    """

    rank: int
    magnitude_init: float = 1.0
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    directions: Directions = field(default_factory=Directions)


@dataclass(frozen=True, eq=False)
class Past:
    """The sum that a new task begins with: the directions of the tasks before it.

    projections: the P weights, or slices of weights, that are adapted. factors: of each task from 1
    to t-1, by projection name. magnitudes: as they are shipped, float64 (t-1,) or (t-1, P).
    """

    projections: tuple[Projection, ...]
    factors: Sequence[Mapping[str, Factors]]
    magnitudes: np.ndarray

    @classmethod
    def of(cls, projections: Sequence[Projection], states: Sequence[TaskState]) -> Past:
        """The past of the task after the last state. states: all so far, task 0 included."""
        factors = [state.factors for state in states[1:]]
        return cls(tuple(projections), factors, states[-1].magnitudes)

    @property
    def tasks(self) -> int:
        """t, with the task that begins."""
        return len(self.factors) + 1

    def factors_of(self, name: str) -> dict[int, Factors]:
        """The factors of one projection by the index of their magnitude.

        An absorbed task has none.
        """
        return {k: own[name] for k, own in enumerate(self.factors) if name in own}


class SDLoRA(nn.Module):
    """The frozen backbone and directions of the tasks so far, and the task that is learned.

    Args:
        backbone: Maps its inputs, such as images (N, 3, H, W), to features (N, features). It is
            frozen here.
        past: What the tasks before have left.
        head: The rows of the new task's classes to start from. `zero_head` gives no random logits,
            which at 14 images a class never quite go away.
        variant: What the new direction and the magnitudes start from.
    """

    trains_magnitudes = True

    def __init__(self, backbone: nn.Module, past: Past, head: Head, variant: Variant) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.projections, self._wide = past.projections, past.magnitudes.ndim == 2
        self.variant, self.rank = variant, variant.rank
        # The stored magnitudes before this task, with a zero for it: (t,), or (t, P).
        self._before = extended(past.magnitudes, np.zeros(self._stored_shape(past.tasks)))
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        # Frozen factors of all old tasks, side by side: (sum of ranks, columns), (rows, sum of
        # ranks).
        self.old_A, self.old_B = nn.ParameterList(), nn.ParameterList()
        self.owners: list[Tensor] = []
        for p in self.projections:
            self._add_projection(p, past.factors_of(p.name))
        start = self._first_magnitudes()
        start[-1] = variant.magnitude_init if self.rank else 0.0
        self.magnitudes = nn.Parameter(
            torch.tensor(start, dtype=torch.float32),
            requires_grad=self.trains_magnitudes and self.rank > 0,
        )
        weight, bias = (torch.from_numpy(array) for array in head)
        self.head = nn.Linear(weight.shape[1], len(weight))
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def _add_projection(self, p: Projection, old: Mapping[int, Factors]) -> None:
        """Prepare the factors of one projection.

        old: its factors so far, by the index of their magnitude.
        """
        like, rows = self.backbone.get_parameter(p.tensor), p.stop - p.start
        A, B, trained = self._start(p, old)
        old = self._summed(old)
        old_A, old_B = np.zeros((0, p.columns), np.float32), np.zeros((rows, 0), np.float32)
        old_A = np.concatenate([old_A, *(f.A.astype(np.float32) for f in old.values())])
        old_B = np.concatenate([old_B, *(f.B.astype(np.float32) for f in old.values())], axis=1)
        self.A.append(nn.Parameter(A.to(like), requires_grad=trained))
        self.B.append(nn.Parameter(B.to(like)))
        self.old_A.append(nn.Parameter(torch.from_numpy(old_A).to(like), requires_grad=False))
        self.old_B.append(nn.Parameter(torch.from_numpy(old_B).to(like), requires_grad=False))
        # For each column of B and row of A, the index of its magnitude.
        owner = [k for k, f in old.items() for _ in range(len(f.A))]
        owner += [len(self._before) - 1] * self.rank
        self.owners.append(torch.tensor(owner, dtype=torch.int64, device=like.device))

    def _start(self, p: Projection, old: Mapping[int, Factors]) -> tuple[Tensor, Tensor, bool]:
        """(A_t float32 (rank, columns), B_t float32 (rows, rank), whether A_t is trained)."""
        A, trained = self.variant.directions.start(self.rank, p.columns, [*old.values()])
        return A, torch.zeros(p.stop - p.start, self.rank), trained

    def _summed(self, old: Mapping[int, Factors]) -> Mapping[int, Factors]:
        """The old directions that stay in the sum."""
        return old

    def _stored_shape(self, tasks: int) -> tuple[int, ...]:
        """Return the shape in which magnitudes are shipped: that of the past.

        It is (t, P) if the past has a magnitude for each projection.
        """
        return (tasks, len(self.projections)) if self._wide else (tasks,)

    def _first_magnitudes(self) -> np.ndarray:
        """Return the magnitudes as the task begins, float64 (t,) or (t, P).

        The caller sets the last one.
        """
        first = self._before.copy()
        first[:-1] = self.variant.magnitudes.start(first[:-1], self.variant.magnitude_init)
        return first

    def coefficients(self) -> Tensor:
        """What B_k A_k is multiplied with in each projection: (t, P)."""
        alpha: Tensor = self.magnitudes
        if not self.variant.magnitudes.trained:
            alpha = torch.cat([alpha[:-1].detach(), alpha[-1:]])
        return alpha if alpha.ndim == 2 else alpha[:, None].expand(-1, len(self.A))

    def weights(self) -> dict[str, Tensor]:
        """Compute W_t of every adapted weight, differentiable in A_t, B_t and all trained
        magnitudes.

        It takes full precision: in half precision, W_0's rounding would swallow small directions.
        """
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

    def features(self, *inputs: Tensor) -> Tensor:
        """The backbone's own features of N items: (N, d), never in half precision.

        Whatever the shipped head sees, a direction is trained behind these: it drifts less.
        """
        return last_under(self.backbone, self.weights(), *inputs).to(self.head.weight.dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of the new task's classes, (N, classes), never in half precision.

        The loss never sees another task's row.
        """
        seen = self.features(*inputs)
        with torch.autocast(seen.device.type, enabled=False):
            logits: Tensor = self.head(seen)
        return logits

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Compute N_t of the direction that is learned: one number, shape ().

        It takes r x r products only: ||BA||_F^2 = sum( (B^T B) * (A A^T) ).
        """
        squares = torch.stack(
            [((B.T @ B) * (A @ A.T)).sum() for A, B in zip(self.A, self.B, strict=True)]
        ).clamp(min=0)
        return squares.mean().sqrt()

    @torch.no_grad()
    def finish_task(self) -> None:
        """Normalise the new direction: alpha_t <- alpha_t N_t, B_t <- B_t / N_t.

        No output changes.
        """
        if not self.rank:
            return
        norm = self.norm()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        self.magnitudes[-1] *= norm
        for B in self.B:
            B /= norm

    @torch.no_grad()
    def absorb(self, shares: np.ndarray) -> None:
        """KD: drop the finished direction and set alpha_k += alpha_t c_k.

        shares: c of `absorb.fit`, float64 (t-1,).
        """
        c = torch.from_numpy(shares).to(self.magnitudes)
        self.magnitudes[:-1] += self.magnitudes[-1] * c
        self.magnitudes[-1] = 0.0
        self.rank = 0

    def directions(self, encoding: str = DEFAULT) -> dict[str, Factors]:
        """Return the finished direction as it is shipped in an encoding.

        It is empty if there is no direction or it was absorbed.
        """
        if not self.rank:
            return {}
        return {
            p.name: encode(Factors(_numpy(A), _numpy(B)), encoding)
            for p, A, B in zip(self.projections, self.A, self.B, strict=True)
        }

    def deltas(self) -> np.ndarray:
        """Return alpha_k(t) - alpha_k(t-1) of every task, float64 (t,) or (t, P).

        The last one is alpha_t itself. Both sides are multiples of the step of magnitudes, so the
        differences are exact.
        """
        stored = round_magnitudes(_numpy(self._stored()).astype(np.float64))
        found: np.ndarray = stored - self._before
        return found

    def _stored(self) -> Tensor:
        """The magnitudes as they are shipped."""
        return self.magnitudes


def zero_head(classes: int, features: int) -> Head:
    """A head without knowledge: all its logits are 0."""
    return np.zeros((classes, features), np.float32), np.zeros(classes, np.float32)


def first_rows(A: np.ndarray, rank: int) -> Tensor:
    """The first `rank` rows of an old A, float32. Raises UsageError if it has fewer."""
    if len(A) < rank:
        raise UsageError(
            f"rank {rank} is more than the {len(A)} of the direction that this task goes on from: "
            f"choose a rank of at most {len(A)}"
        )
    return torch.from_numpy(A[:rank].astype(np.float32))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

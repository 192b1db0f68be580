"""What the host computes with finished weights: features and logits of a backbone whose adapted
weights are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..state import Projection, TaskState
from .backbones import shaped
from .feature_spec import LAST, FeatureSpec
from .features import Extractor


class Merged:
    """A backbone under merged weights, which are uploaded once.

    Args:
        backbone: Maps its inputs, such as images (N, 3, H, W), to features (N, features). It is
            not changed.
        weights: W_t of every adapted weight, {tensor: float32 (rows, columns)}; empty for W_0.
        exact: Compute in float64, so that a device differs by its own rounding alone. (Measured on
            ViT-Tiny with logits up to 48: ONNX Runtime in float32 is up to 1e-4 away from float64,
            torch in float32 up to 1.5e-4.)
        spec: What the head sees.
    """

    def __init__(
        self,
        backbone: nn.Module,
        weights: Mapping[str, np.ndarray],
        exact: bool = False,
        spec: FeatureSpec = LAST,
    ) -> None:
        self.backbone = backbone.eval()
        self._extractor = Extractor(backbone, spec).eval()
        self.device = next(backbone.parameters()).device
        self.dtype = torch.float64 if exact else torch.float32
        tensors: dict[str, Tensor] = {}
        if exact:  # everything must be float64 then, not the adapted weights alone
            tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
        tensors |= shaped(backbone, {name: torch.from_numpy(w) for name, w in weights.items()})
        self._tensors = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def features(self, *inputs: np.ndarray | Tensor) -> np.ndarray:
        """Compute what the head sees of N items.

        inputs: the model's, such as float32 (N, 3, H, W), on any device. Returns (N, features),
        float32, or float64 if exact. The first of them are the backbone's own, whatever else the
        head sees.
        """
        given = [torch.as_tensor(array) for array in inputs]
        moved = [t.to(self.device, self.dtype if t.is_floating_point() else None) for t in given]
        return _numpy(self._extractor.under(self._tensors, *moved).to(self.dtype))


def logits_of(state: TaskState, seen: np.ndarray) -> np.ndarray:
    """The head of a state: features (N, features) to logits float32 (N, classes)."""
    weight, bias = state.head_weight.astype(seen.dtype), state.head_bias.astype(seen.dtype)
    found: np.ndarray = (seen @ weight.T + bias).astype(np.float32)
    return found


def adapted_weights(
    backbone: nn.Module, projections: Sequence[Projection]
) -> dict[str, np.ndarray]:
    """W_0 of every adapted weight: {tensor: float32 (rows, columns)}."""
    return {
        p.tensor: _numpy(backbone.get_parameter(p.tensor).flatten(1)).astype(np.float32)
        for p in projections
    }


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

"""int8 for ExecuTorch: linear layers that are not adapted, with a scale per row (output channel).

XNNPACK has kernels for both kinds:

    int8           the weight only: float32 activations times int8 weights ("F32, QC8W")
    int8-dynamic   the activations too, with a scale per token chosen at run time
                   ("QD8, F32, QC8W")
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .precision import FEW, KEPT

PRECISIONS = ("int8", "int8-dynamic")


class _Int8Linear(nn.Module):
    """A linear layer as XNNPACK's partitioner recognises it."""

    weight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, dynamic: bool) -> None:
        super().__init__()
        matrix = linear.weight.detach()
        scale = (matrix.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", torch.round(matrix / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        self.bias = linear.bias
        self.dynamic = dynamic

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.quantized_decomposed
        weight = q.dequantize_per_channel(
            self.weight, self.scale, self.zero, 0, -127, 127, torch.int8
        )
        if self.dynamic:
            scale, zero = q.choose_qparams_per_token_asymmetric(x, torch.int8)
            x = q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            x = q.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
            return nn.functional.linear(x, weight, self.bias)
        # bias apart: XNNPACK's serialiser takes one beside an int8 weight only if activations
        # are int8 too
        product = nn.functional.linear(x, weight)
        return product if self.bias is None else product + self.bias


def quantise(model: nn.Module, adapted: Collection[str], precision: str) -> None:
    """Replace the linear layers whose weight is not adapted.

    The first share, KEPT, stays float32, as in ONNX. Raises UsageError if there is no such layer.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers the operators)

    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.weight" not in adapted
        and module.weight.numel() >= FEW
    ]
    if not linear:
        raise UsageError(
            f"precision {precision} finds no linear layer that is not adapted: choose fp32"
        )
    for name, module in linear[round(KEPT * len(linear)) :]:
        model.set_submodule(name, _Int8Linear(module, precision == "int8-dynamic"))


def partitioning() -> list[type[Any]]:
    """XNNPACK's rules on what it takes, plus: int8 weights with float32 activations."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, tag_as_implicit_q_dq

    class WeightOnly(LinearConfig):  # type: ignore[misc]
        def get_deps(self, node: Any, ep: Any) -> tuple[bool, list[Any]]:
            activations, weight = node.args[:2]
            if is_dequant(weight) and not is_dequant(activations):
                tag_as_implicit_q_dq(weight)
                return True, [weight, *weight.all_input_nodes]
            found: tuple[bool, list[Any]] = super().get_deps(node, ep)
            return found

    return [WeightOnly if config is LinearConfig else config for config in ALL_PARTITIONER_CONFIGS]

"""What each precision may cost, and how an ONNX graph is brought to it.

Adapted weights and head are never quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from ..errors import UsageError

FEW = 1024
"""A constant with fewer numbers stays as it is: it weighs nothing, and may be sensitive."""
BLOCK = 32
"""Weights that share a scale, along the input dimension. With one scale for each whole channel,
98.9 instead of 99.5 % of Omniglot's test images kept their class in a simulation (rounded weights
in float32), and 99.4 instead of 99.5 % of Caltech-101's."""
KEPT = 1 / 6
"""share of the matrices, from the first, that stays float16: an error there passes every layer"""


@dataclass(frozen=True)
class Precision:
    """The bounds of one precision.

    Attributes:
        stored: dtype of adapted weights and head, as `bundle.DTYPES` names it.
        tolerance: largest logit difference for logits up to `unit`. It grows with larger logits, as
            rounding does.
        canary: the same for the canary, whose images make smaller differences. Up to 0.0005, 0.025
            and 0.055 were seen for fp16, int8 and int8-dynamic; 0.02 to 0.07 if a task is left out.
        agreement: smallest share of images that get the same class.
        unit: largest logit that `tolerance` is meant for as it is.
    """

    stored: str
    tolerance: float
    canary: float
    agreement: float
    unit: float = 1.0

    @property
    def quantised(self) -> bool:
        return self.agreement < 1


PRECISIONS = {
    "fp32": Precision("float32", 1e-4, 1e-4, 1.0, unit=50.0),
    "fp16": Precision("float16", 0.01, 0.002, 0.99),
    "int8": Precision("float16", 0.1, 0.05, 0.98),
    "int8-dynamic": Precision("float16", 0.3, 0.1, 0.9),
}


def named(precision: str) -> Precision:
    """Raises UsageError for an unknown one."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown: choose {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def lower(model: ModelProto, precision: str) -> ModelProto:
    """Bring the constants of a model to a precision.

    The model's adapted weights are inputs without defaults.
    """
    if precision == "fp32":
        return model
    if precision != "fp16":
        model = _quantised(model, precision)
    floats = (t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    halve(model, {t.name for t in floats if np.prod(t.dims) >= FEW})
    return model


def _quantised(model: ModelProto, precision: str) -> ModelProto:
    """The model with its large layers in int8, but for the first share, KEPT."""
    layers = _large_layers(model)
    layers = layers[round(KEPT * len(layers)) :]
    products = [node.name for node in layers if node.op_type == "MatMul"]
    if precision == "int8-dynamic" and products:
        model = _dynamic(model, products)
        layers = [node for node in layers if node.op_type == "Conv"]
    _weight_only(model, {node.input[1] for node in layers})
    return model


def _large_layers(model: ModelProto) -> list[NodeProto]:
    """The products and convolutions with a constant weight of FEW numbers or more, in order."""
    large = {
        t.name for t in model.graph.initializer if len(t.dims) in (2, 4) and np.prod(t.dims) >= FEW
    }
    nodes = (node for node in model.graph.node if node.op_type in ("MatMul", "Conv"))
    return [node for node in nodes if node.input[1] in large]


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """float16, rounded to nearest. Raises UsageError if a value does not fit."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(
            f"{name} holds a value too large for float16: export with --precision fp32"
        )
    return half


def halve(model: ModelProto, names: Collection[str]) -> None:
    """Store these constants, or inputs with defaults, as float16, each behind a Cast to float32.

    ONNX Runtime folds the Cast away if nothing can replace the constant.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(
                numpy_helper.from_array(
                    to_half(numpy_helper.to_array(tensor), tensor.name), tensor.name
                )
            )
            casts.append(_behind(model, tensor.name, "Cast", [], to=TensorProto.FLOAT))
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _prepend(model, casts)


def _weight_only(model: ModelProto, names: Collection[str]) -> None:
    """Store these constants as int8 with float32 scales, behind ONNX's own DequantizeLinear."""
    unpacked = []
    for tensor in [t for t in model.graph.initializer if t.name in names]:
        name = tensor.name
        packed, scale, how = _pack(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(packed, name))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        unpacked.append(_behind(model, name, "DequantizeLinear", [f"{name}.scale"], **how))
    _prepend(model, unpacked)


def _pack(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Quantise a weight: (int8 of the same shape, float32 scales, DequantizeLinear's attributes).

    A matrix (inputs, outputs) gets a scale for every BLOCK inputs of an output. A kernel (outputs,
    inputs, height, width) gets one for each output, and so does a matrix whose number of inputs
    BLOCK does not divide.
    """
    if weight.ndim == 4 or len(weight) % BLOCK:
        axis = 0 if weight.ndim == 4 else 1
        scale = _scale(
            np.abs(weight).max(
                axis=tuple(i for i in range(weight.ndim) if i != axis), keepdims=True
            )
        )
        return np.round(weight / scale).astype(np.int8), scale.reshape(-1), {"axis": axis}
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    scale = _scale(np.abs(blocks).max(axis=1))
    packed = np.round(blocks / scale[:, None]).astype(np.int8).reshape(weight.shape)
    return packed, scale, {"axis": 0, "block_size": BLOCK}


def _scale(largest: np.ndarray) -> np.ndarray:
    """The value of one step of int8, given the largest value; 1 if all are zero."""
    return np.where(largest > 0, largest / np.float32(127), np.float32(1))


def _dynamic(model: ModelProto, names: list[str]) -> ModelProto:
    """Quantise products: weights to int8 with a scale per channel, activations at run time."""
    from tempfile import TemporaryDirectory

    import onnx

    with TemporaryDirectory() as folder, _quiet():
        quantize_dynamic(
            model,
            f"{folder}/m.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=names,
        )
        return onnx.load(f"{folder}/m.onnx")


def _behind(
    model: ModelProto, name: str, operator: str, more: list[str], **attributes: Any
) -> NodeProto:
    """A node between a constant and all nodes that read it."""
    made = f"{name}.float32"
    for node in model.graph.node:
        node.input[:] = [made if i == name else i for i in node.input]
    return helper.make_node(operator, [name, *more], [made], **attributes)


def _prepend(model: ModelProto, nodes: list[NodeProto]) -> None:
    nodes = [*nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@contextmanager
def _quiet() -> Any:
    """Silence the quantiser, which logs every node to the root logger."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)

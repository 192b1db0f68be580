"""What each precision may cost, and how an ONNX graph is brought to it. Adapted weights and head are never quantised."""

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
"""a constant of fewer numbers is left as it is: it weighs nothing, and may be sensitive"""
BLOCK = 32
"""weights of one scale, along the input dimension: with one for each whole channel, 98.9 instead of 99.5 % of Omniglot's test
images kept their class in a simulation (rounded weights in float32), 99.4 instead of 99.5 % of Caltech-101's"""
KEPT = 1 / 6
"""of the matrices, the first ones, stay float16: what is lost there goes through the whole depth"""


@dataclass(frozen=True)
class Precision:
    """stored: dtype of adapted weights and head, as `bundle.DTYPES` names it.

    tolerance: the largest logit difference for logits up to `unit`; where there are larger ones it grows with them, as rounding
    does. canary: the same for the canary, whose images make smaller differences: up to 0.0005, 0.025 and 0.055 were seen for
    fp16, int8 and int8-dynamic, and 0.02 to 0.07 where a task is left out. agreement: the smallest share of images that get the same class, unless the user says otherwise.
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
    """Raises UsageError for one that is unknown."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def lower(model: ModelProto, precision: str) -> ModelProto:
    """The model, whose adapted weights are inputs without defaults, with its constants at a precision."""
    if precision == "fp32":
        return model
    if precision != "fp16":
        constants = {
            t.name
            for t in model.graph.initializer
            if len(t.dims) in (2, 4) and np.prod(t.dims) >= FEW
        }
        layers = [
            node
            for node in model.graph.node
            if node.op_type in ("MatMul", "Conv") and node.input[1] in constants
        ]
        layers = layers[round(KEPT * len(layers)) :]
        products = [node.name for node in layers if node.op_type == "MatMul"]
        if precision == "int8-dynamic" and products:
            model = _dynamic(model, products)
            layers = [node for node in layers if node.op_type == "Conv"]
        _weight_only(model, {node.input[1] for node in layers})
    halve(
        model,
        {
            t.name
            for t in model.graph.initializer
            if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= FEW
        },
    )
    return model


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """float16, rounded to nearest. Raises UsageError where a value does not fit."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(
            f"{name} holds a value too large for float16: export with --precision fp32"
        )
    return half


def halve(model: ModelProto, names: Collection[str]) -> None:
    """Store these constants, or inputs with defaults, as float16, each behind a Cast to float32; ONNX Runtime folds it away
    where nothing can replace the constant."""
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
    """(int8 of the same shape, float32 scales, attributes of DequantizeLinear). One scale for every BLOCK inputs of an output
    of a matrix (inputs, outputs); for each output of a kernel (outputs, inputs, height, width), or of a matrix whose inputs
    make no whole number of blocks."""
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
    """What one step of int8 stands for, where so much is the largest; 1 where all is zero."""
    return np.where(largest > 0, largest / np.float32(127), np.float32(1))


def _dynamic(model: ModelProto, names: list[str]) -> ModelProto:
    """ONNX Runtime's dynamic quantisation of these products: weights int8, a scale per channel; activations when it runs."""
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
    """A node that makes of a constant what its readers take from now on."""
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
    """The quantiser logs every node to the root logger."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)

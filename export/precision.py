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
"""weights of one scale, along the input dimension: one for each whole channel (row) loses a point more agreement"""
KEPT = 1 / 6
"""of the matrices, the first ones, stay float16: what is lost there goes through the whole depth"""


@dataclass(frozen=True)
class Precision:
    """stored: dtype of adapted weights and head, as `bundle.DTYPES` names it.

    tolerance: the largest logit difference for logits up to `unit`; where there are larger ones it grows with them, as rounding
    does. agreement: the smallest share of pictures that get the same class, unless the user says otherwise.
    """

    stored: str
    tolerance: float
    agreement: float
    unit: float = 1.0

    @property
    def quantised(self) -> bool:
        return self.agreement < 1


PRECISIONS = {
    "fp32": Precision("float32", 1e-4, 1.0, unit=50.0),
    "fp16": Precision("float16", 0.01, 0.99),
    "int8": Precision("float16", 0.1, 0.97),
    "int8-dynamic": Precision("float16", 0.3, 0.9),
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
        constants = {t.name for t in model.graph.initializer if len(t.dims) == 2 and np.prod(t.dims) >= FEW}
        matrices = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
        kept = round(KEPT * len(matrices))
        if precision == "int8":
            _in_blocks(model, matrices[kept:])
        else:
            model = _dynamic(model, [node.name for node in matrices[kept:]])
    halve(model, {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= FEW})
    return model


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """float16, rounded to nearest. Raises UsageError where a value does not fit."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(f"{name} holds a value too large for float16: export with --precision fp32")
    return half


def halve(model: ModelProto, names: Collection[str]) -> None:
    """Store these constants, or inputs with defaults, as float16, each behind a Cast to float32; ONNX Runtime folds it away
    where nothing can replace the constant."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(to_half(numpy_helper.to_array(tensor), tensor.name), tensor.name))
            casts.append(_behind(model, tensor.name, "Cast", [], to=TensorProto.FLOAT))
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _prepend(model, casts)


def _in_blocks(model: ModelProto, products: list[NodeProto]) -> None:
    """Store the constant of each product (columns, rows) as int8 with a float32 scale for every BLOCK columns of a row (for
    all of them where they make no whole number of blocks), behind ONNX's own DequantizeLinear."""
    tensors = {t.name: t for t in model.graph.initializer}
    unpacked = []
    for name in dict.fromkeys(node.input[1] for node in products):
        matrix = numpy_helper.to_array(tensors[name])
        columns, rows = matrix.shape
        block = BLOCK if columns % BLOCK == 0 else columns
        blocks = matrix.reshape(columns // block, block, rows)
        scale = np.abs(blocks).max(axis=1) / np.float32(127)
        scale[scale == 0] = 1
        packed = np.round(blocks / scale[:, None]).astype(np.int8).reshape(matrix.shape)
        tensors[name].CopyFrom(numpy_helper.from_array(packed, name))
        how = {"axis": 0, "block_size": block} if block < columns else {"axis": 1}
        stored = scale if block < columns else scale[0]
        model.graph.initializer.append(numpy_helper.from_array(stored, f"{name}.scale"))
        unpacked.append(_behind(model, name, "DequantizeLinear", [f"{name}.scale"], **how))
    _prepend(model, unpacked)


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


def _behind(model: ModelProto, name: str, operator: str, more: list[str], **attributes: Any) -> NodeProto:
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

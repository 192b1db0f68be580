"""An ONNX model whose adapted weights and head can be replaced.

Either they are inputs with defaults (overridable initializers), and an update needs no new session.
Or they are inputs without defaults: ONNX Runtime for JavaScript replaces no default. Or they are
constants outside the model's file, and an update makes a new session.

The file runs as it is in any ONNX Runtime program. Adapted weights and head lie in
weights.safetensors, which ONNX takes as external data. There is one copy: the engine reads it
through the graph, and the device runtime reads it as W_e.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..device.engines import with_room
from ..device.engines.onnx_runtime import FEATURES, LOGITS, MODEL
from ..errors import InputError, UsageError
from ..formats.bundle import CONSTANTS, HEAD_BIAS, HEAD_WEIGHT, PLAIN_INPUTS
from ..inputs.modality import Preparation
from ..method.backbones import shaped
from ..method.features import Extractor
from ..storage import atomic
from . import precision as precisions
from .form import ModelForm

OPSET = 21
WEIGHTS = "weights.safetensors"
REST = "model.onnx.data"
"""the other constants, if the model is too large for a protobuf"""
OUTPUTS = [LOGITS, FEATURES]
"""the second is what the head sees: the unknown score may need it (`formats.confidence`)"""
LIMIT = 1 << 30
"""bytes"""


class _Functional(nn.Module):
    """Logits and features, with the adapted weights, each (rows, columns), and head as
    arguments."""

    def __init__(self, features: Extractor) -> None:
        super().__init__()
        self.features = features

    def forward(
        self,
        inputs: dict[str, Tensor],
        weights: dict[str, Tensor],
        head_weight: Tensor,
        head_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        adapted = shaped(self.features.backbone, weights)
        seen = self.features.under(adapted, *inputs.values())
        return nn.functional.linear(seen, head_weight, head_bias), seen


def write_model(
    backbone: nn.Module,
    weights: Mapping[str, np.ndarray],
    folder: Path,
    form: ModelForm,
    facts: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Write a model into a folder.

    Args:
        backbone: maps its inputs to features.
        weights: {tensor: float32 (rows, columns)} of all adapted weights, and the head.
        folder: where model.onnx and weights.safetensors are written.
        form: the model's form.
        facts: the model's metadata_props.

    Returns:
        The manifest's `weights`.

    Raises:
        InputError: torch cannot export this backbone.
    """
    stored = {name: with_room(name, weight, form.capacity) for name, weight in weights.items()}
    features = Extractor(backbone.cpu(), form.features).eval()
    model = _trace(features, form.prepare, stored)
    model = precisions.lower(model, form.precision)
    for name, value in stored.items():
        model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name)
        )
    if precisions.named(form.precision).stored == "float16":
        precisions.halve(model, set(stored) - {HEAD_BIAS})
    if form.weights_as == CONSTANTS:
        del model.graph.input[len(form.prepare.axes) :]
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(stored[HEAD_BIAS])
    helper.set_model_props(model, dict(facts))
    places = _store_externally(model.graph, list(stored), folder / WEIGHTS)
    if form.weights_as == PLAIN_INPUTS:
        _take_defaults(model.graph, stored)
    _save(model, folder)
    return places


def _trace(
    features: Extractor, prepare: Preparation, weights: Mapping[str, np.ndarray]
) -> ModelProto:
    """The graph. Each weight is an input of its name; other constants bear the backbone's names."""
    adapted = {
        name: torch.from_numpy(w)
        for name, w in weights.items()
        if name not in (HEAD_WEIGHT, HEAD_BIAS)
    }
    # two of everything that may have any length: a dimension of 1 would be taken as fixed
    example = {name: torch.from_numpy(a) for name, a in prepare.canary(0, 2).items()}
    dynamic = {0: torch.export.Dim.DYNAMIC}
    shapes = {
        name: dict.fromkeys(range(len(axes)), torch.export.Dim.DYNAMIC)
        for name, axes in prepare.axes.items()
    }
    head = torch.zeros(2, weights[HEAD_WEIGHT].shape[1]), torch.zeros(2)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Functional(features).eval(),
            (example, adapted, *head),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=(shapes, dict.fromkeys(adapted), dynamic, dynamic),
        )
    if program is None:
        raise InputError("this backbone cannot be exported: torch.onnx.export returned nothing")
    model = program.model_proto
    for node in model.graph.node:
        # where torch traced it: paths of this machine, and a third of a small model's bytes
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    _rename(model.graph, [*example, *adapted, HEAD_WEIGHT, HEAD_BIAS], prepare, features.backbone)
    return model


def _rename(graph: Any, inputs: list[str], prepare: Preparation, backbone: nn.Module) -> None:
    """Give inputs, outputs, constants and dynamic dimensions their names.

    Constants get the names of the backbone's own parameters.
    """
    names = dict(
        zip([v.name for v in (*graph.input, *graph.output)], [*inputs, *OUTPUTS], strict=True)
    )
    names |= _constants(graph, backbone)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    dimensions = {_dimensions(graph.input[-1])[0].dim_param: "classes"}
    for value, axes in zip(graph.input, prepare.axes.values()):
        for dim, name in zip(_dimensions(value), axes):
            dimensions[dim.dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in _dimensions(value):
            if dim.dim_param in dimensions:
                dim.dim_param = dimensions[dim.dim_param]


def _dimensions(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def _constants(graph: Any, backbone: nn.Module) -> dict[str, str]:
    """{name in the graph: name in the backbone}; with .T for a transposed weight."""
    names = {
        tensor.name: tensor.name.removeprefix("features.backbone.") for tensor in graph.initializer
    }
    turned = {
        p.detach().numpy().T.tobytes(): f"{name}.T"
        for name, p in backbone.named_parameters()
        if p.ndim == 2
    }
    for tensor in graph.initializer:  # torch.onnx stores a linear layer's weight transposed
        if len(tensor.dims) == 2 and tensor.name.startswith("val_"):
            names[tensor.name] = turned.pop(numpy_helper.to_array(tensor).tobytes(), tensor.name)
    return names


def _store_externally(graph: Any, names: list[str], path: Path) -> dict[str, dict[str, Any]]:
    """Move these constants into a safetensors file beside the model. Return where each lies."""
    tensors = {t.name: t for t in graph.initializer if t.name in names}
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    atomic.write(
        path,
        safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        ),
    )
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    places = {}
    for name, tensor in tensors.items():
        start, stop = table[name]["data_offsets"]
        offset = 8 + length + start
        places[name] = {
            "file": path.name,
            "offset": offset,
            "dtype": str(arrays[name].dtype),
            "shape": list(arrays[name].shape),
        }
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in {
            "location": path.name,
            "offset": str(offset),
            "length": str(stop - start),
        }.items():
            tensor.external_data.add(key=key, value=text)
    return places


def _take_defaults(graph: Any, names: Collection[str]) -> None:
    """Leave these inputs without a default. Raises UsageError if JavaScript could not load it."""
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    if sum(len(tensor.raw_data) for tensor in kept) > LIMIT:
        raise UsageError(
            "this model is too large for a browser: leave --for web out, or choose a smaller "
            "backbone or --precision int8"
        )
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _save(model: ModelProto, folder: Path) -> None:
    if sum(len(t.raw_data) for t in model.graph.initializer) > LIMIT:
        onnx.save_model(
            model,
            folder / MODEL,
            save_as_external_data=True,
            location=REST,
            size_threshold=precisions.FEW,
        )
    else:
        atomic.write(folder / MODEL, model.SerializeToString())
    onnx.checker.check_model(str(folder / MODEL))

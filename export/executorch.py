"""Export to ExecuTorch: model.pte for XNNPACK, and model.ptd with all that an update replaces.

model.ptd holds every adapted weight and the head as raw bytes. The program is traced with random
numbers in their place, and then patched as a device patches it. So each tensor is found by numbers
that stand nowhere else (ExecuTorch stores equal constants once), and the program does not depend on
the values that it was exported with.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..device.engines import with_room
from ..device.engines.executorch_runtime import DATA, PROGRAM, patched
from ..errors import InputError, UsageError
from ..formats.bundle import HEAD_BIAS, HEAD_WEIGHT
from ..inputs.modality import Preparation
from ..method.features import Extractor
from ..storage import atomic
from . import executorch_int8 as int8
from .form import ModelForm

PRECISIONS = ("fp32", *int8.PRECISIONS)
SEED = 0


class _Whole(nn.Module):
    """One item to logits (1, capacity) and what the head sees (1, features).

    One, because XNNPACK gains nothing from more: a dynamic batch leaves shapes outside the
    delegate, and costs 16 to 39 % for each image (docs/executorch.md).
    """

    def __init__(self, features: Extractor, head: nn.Linear) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.features(*inputs)
        return self.head(seen), seen


def write_program(
    backbone: nn.Module, weights: Mapping[str, np.ndarray], folder: Path, form: ModelForm
) -> dict[str, dict[str, Any]]:
    """Write model.pte and model.ptd into a folder.

    Args:
        backbone: maps its inputs to features.
        weights: {tensor: float32 (rows, columns)} of all adapted weights, and the head.
        folder: where both files are written.
        form: the model's form. The head gets `capacity` rows.

    Returns:
        The manifest's `weights`.

    Raises:
        UsageError: executorch is not installed, or has no such precision.
        InputError: the backbone cannot be lowered with its adapted weights as raw bytes.
    """
    if form.precision not in PRECISIONS:
        raise UsageError(
            f"target executorch has no precision {form.precision!r}: choose {', '.join(PRECISIONS)}"
        )
    stored = {name: with_room(name, weight, form.capacity) for name, weight in weights.items()}
    features = Extractor(copy.deepcopy(backbone).cpu().float(), form.features)
    model, noise = _with_noise(features, stored)
    if form.precision in int8.PRECISIONS:
        int8.quantise(model, set(noise.values()), form.precision)
    lowered = _lower(model, form.prepare, set(noise.values()))
    lowered.write_tensor_data_to_file(str(folder))
    data = atomic.read(folder / DATA)
    places = {
        name: _find(data, model.get_parameter(parameter), name, stored[name].shape)
        for name, parameter in noise.items()
    }
    data = b"".join(patched(io.BytesIO(data), places, stored))
    for name, place in places.items():
        found = np.frombuffer(data, np.float32, stored[name].size, place["offset"])
        if not np.array_equal(found, stored[name].reshape(-1)):
            raise InputError(f"{name} cannot be placed in {DATA}: it overlaps another tensor")
    atomic.write(folder / PROGRAM, bytes(lowered.buffer))
    atomic.write(folder / DATA, data)
    return places


def _lower(model: nn.Module, prepare: Preparation, external: set[str]) -> Any:
    """ExecuTorch's program for inputs of full length, with these parameters in a file of their own.

    Raises UsageError, InputError.
    """
    full = prepare.arrays(prepare.stacked([np.zeros(prepare.shape, prepare.dtype)]))
    example = tuple(map(torch.from_numpy, full.values()))
    tag = DATA.removesuffix(".ptd")
    with _quiet():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import (
                EdgeCompileConfig,
                ExecutorchBackendConfig,
                to_edge_transform_and_lower,
            )
            from executorch.exir.passes.external_constants_pass import (
                delegate_external_constants_pass_unlifted,
            )
        except ImportError as error:
            raise UsageError(
                "--target executorch needs executorch: pip install 'sdlora-edge[executorch]'"
            ) from error
        try:
            graph = torch.export.export(model, example).module()
            _keep_apart(graph, external)
            delegate_external_constants_pass_unlifted(
                graph, lambda node: tag if node.target in external else None
            )
            edge = to_edge_transform_and_lower(
                torch.export.export(graph, example),
                partitioner=[XnnpackPartitioner(configs=int8.partitioning())],
                # no check, because quantised operators are not core ATen
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            names = edge.exported_program().graph_signature.inputs_to_parameters
            # a weight that XNNPACK did not take is a constant of the program itself
            outside = ExecutorchBackendConfig(
                external_constants=lambda node: tag if names.get(node.name) in external else None
            )
            return edge.to_executorch(outside)
        except Exception as error:  # torch.export and each pass raise their own kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"this backbone cannot be lowered to ExecuTorch: {reason}") from error


def _with_noise(
    features: Extractor, weights: Mapping[str, np.ndarray]
) -> tuple[_Whole, dict[str, str]]:
    """The model with random adapted weights and head, and {tensor: its parameter}."""
    generator = torch.Generator().manual_seed(SEED)
    random = {
        name: torch.randn(array.shape, generator=generator) / array.shape[-1] ** 0.5
        for name, array in weights.items()
    }
    rows, columns = weights[HEAD_WEIGHT].shape
    model = _Whole(features.eval(), nn.Linear(columns, rows)).requires_grad_(False)
    names = {
        name: name if name in (HEAD_WEIGHT, HEAD_BIAS) else f"features.backbone.{name}"
        for name in weights
    }
    for name, value in random.items():
        model.get_parameter(names[name]).copy_(value.view_as(model.get_parameter(names[name])))
    for module in model.modules():
        # timm's flag: what torch makes of fused attention keeps half of it outside XNNPACK
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]
    return model, names


def _keep_apart(graph: GraphModule, names: set[str]) -> None:
    """Replace each batch norm after an adapted layer by a depthwise convolution: scale and shift.

    Else XNNPACK's passes would multiply the scale into the weight, and a device could not replace
    that weight by its own.
    """
    norms = [node for node in graph.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    for index, node in enumerate(norms):
        if not any(a.op == "get_attr" and a.target in names for a in node.args[0].all_input_nodes):
            continue
        scale, shift = _affine(graph, node)
        convolution = node.meta["val"].ndim == 4
        # a linear layer's channels are its second dimension, whatever follows
        ones = (1, 1, 1) if convolution else (1,) * (node.meta["val"].ndim - 2)
        values = {
            "scale": scale.reshape(-1, *ones),
            "shift": shift if convolution else shift.reshape(-1, *ones),
        }
        made = []
        with graph.graph.inserting_before(node):
            for what, value in values.items():
                name = f"norm_{index}_{what}"
                graph.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))
                made.append(graph.graph.get_attr(name))
            new = _scaled(graph, node.args[0], made, len(scale) if convolution else 0)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _scaled(graph: GraphModule, inputs: Any, made: list[Node], channels: int) -> Node:
    """The node that scales and shifts. channels: of a convolution; 0 after a linear layer."""
    call, aten = graph.graph.call_function, torch.ops.aten
    if channels:
        return call(aten.conv2d.default, (inputs, *made, [1, 1], [0, 0], [1, 1], channels))
    return call(aten.add.Tensor, (call(aten.mul.Tensor, (inputs, made[0])), made[1]))


def _affine(graph: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm, float64: a number for each channel."""
    weight, bias, mean, variance = norm.args[1:5]
    epsilon: Any = norm.args[7]
    scale = (_value(graph, variance).double() + epsilon).rsqrt()
    if weight is not None:
        scale = scale * _value(graph, weight).double()
    shift = -_value(graph, mean).double() * scale
    return scale, shift if bias is None else shift + _value(graph, bias).double()


def _value(graph: GraphModule, node: Any) -> Tensor:
    """The tensor that a get_attr node stands for."""
    path, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(path), name).detach()  # type: ignore[no-any-return]


def _find(data: bytes, value: Tensor, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The manifest's entry for a tensor.

    Raises InputError unless its bytes stand in the file exactly once.
    """
    raw = value.detach().numpy().tobytes()
    offset = data.find(raw)
    if offset < 0 or data.find(raw, offset + 1) >= 0:
        raise InputError(
            f"{name} does not lie as raw bytes in {DATA}, so no device could replace it: choose "
            "other --targets"
        )
    return {"file": DATA, "offset": offset, "dtype": "float32", "shape": list(shape)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch and ExecuTorch say about their own insides."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)

"""Export to ONNX: adapted weights and head as overridable initializers, so an update needs no other model and no new session.

The file runs as it is in any ONNX Runtime program. The initializers' values lie in weights.safetensors, which ONNX takes as
external data: one copy, read by the engine through the graph and by the device runtime as W_e.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import struct
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.func import functional_call

from .. import bundle, files, signing
from ..bundle import FACTORS, HEAD_BIAS, HEAD_WEIGHT, MANIFEST, TRUST, WEIGHTS, Manifest
from ..canonical import dump_json
from ..device import canary
from ..device.engines import open_engine
from ..device.engines.onnx import MODEL
from ..errors import InputError, UsageError
from ..method.backbones import shaped
from ..packet import ENCODING
from ..state import factor_tensors
from ..train import data
from ..train.run import Run
from ..train.score import test_pictures_by_class
from .parity import Parity, compare, host_logits

log = logging.getLogger("sdlora_edge")
OPSET = 20
TOLERANCE = 1e-4
CANARY_SEED = 0
PARITY_PICTURES = 64


class _Functional(nn.Module):
    """The backbone with its adapted weights, each (rows, columns), and head as arguments."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pictures: Tensor, weights: dict[str, Tensor], head_weight: Tensor, head_bias: Tensor) -> Tensor:
        features = functional_call(self.backbone, shaped(self.backbone, weights), (pictures,))
        return nn.functional.linear(features, head_weight, head_bias)


def export_onnx(
    run: Run,
    out: Path,
    task: int | None = None,
    trust: list[str] | None = None,
    threshold: int = 1,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write the bundle of a run's state after `task` (default: the last) to the new folder `out`, proved against torch.

    trust: names or files of public keys; by default the only one in keys/. Raises UsageError where `out` exists, the state
    knows no class, or a key is missing; HealthError where ONNX Runtime's logits differ from torch's by more than `tolerance`
    on any picture or the canary, or the argmax differs.
    """
    state = run.state(task)
    if not state.classes:
        raise UsageError(f"task {state.task} knows no class yet: export a later one with --task")
    keys = _trust(trust, threshold)
    weights = run.weights(state.task) | {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
    with files.new_folder(out) as folder:
        files.write(folder / WEIGHTS, safetensors.numpy.save(weights))
        _write_graph(run, weights, folder)
        stored = {f"{k}.{n}": t for k, f in enumerate(run.factors(state.task), 1) for n, t in factor_tensors(f).items()}
        files.write(folder / FACTORS, safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in stored.items()}))
        files.write(folder / TRUST, dump_json(keys.to_dict()))
        seen = host_logits(run, state.task, canary.inputs(CANARY_SEED, run.preprocessing))
        manifest = Manifest(
            lineage=run.lineage,
            state=state.digest,
            task=state.task,
            task_name=state.name,
            model=run.config.backbone,
            target="onnx",
            precision="fp32",
            tolerance=tolerance,
            encoding=ENCODING,
            classes=state.classes,
            magnitudes=tuple(state.magnitudes.tolist()),
            preprocessing=asdict(run.preprocessing),
            projections=run.projections,
            canary={"seed": CANARY_SEED, "logits": seen.tolist()},
            files={name: bundle.describe(folder / name) for name in (MODEL, WEIGHTS, FACTORS, TRUST)},
        )
        files.write(folder / MANIFEST, manifest.to_json())
        proved = prove(run, folder, state.task).require(tolerance, "the exported model")
    opened = bundle.open_bundle(out)
    return {
        "bundle": str(out),
        "id": opened.id,
        "task": state.task,
        "classes": list(state.classes),
        "model_bytes": opened.model_bytes,
        "trusted_keys": [key.keyid for key in keys.keys],
        "pictures": proved.pictures,
        "largest_difference": proved.difference,
    }


def prove(run: Run, folder: Path, task: int) -> Parity:
    """Compare a bundle, in its engine, with torch: on its canary and on test pictures of the run that can still be read."""
    opened = bundle.open_bundle(folder)
    engine = open_engine(opened)
    loaded = engine.load({**opened.weights, HEAD_WEIGHT: opened.state.head_weight, HEAD_BIAS: opened.state.head_bias})
    inputs = canary.inputs(opened.manifest.canary["seed"], run.preprocessing)
    reference = [np.array(opened.manifest.canary["logits"], np.float32)]
    pixels = _some_pixels(run, task)
    if len(pixels):
        pictures = run.preprocessing.normalise(pixels)
        inputs = np.concatenate([inputs, pictures])
        reference.append(host_logits(run, task, pictures))
    else:
        log.warning("no test picture can be read: the exported model is compared on its canary only")
    return compare(engine.run(loaded, inputs), np.concatenate(reference))


def _some_pixels(run: Run, task: int) -> np.ndarray:
    """Up to PARITY_PICTURES test pictures, spread over the classes."""
    by_class = test_pictures_by_class(run, task)
    each = -(-PARITY_PICTURES // max(1, len(by_class)))
    few = {c: pictures[:each] for c, pictures in by_class.items()}
    return data.decode(few, list(few), run.preprocessing, need=False).pixels[:PARITY_PICTURES]


def _trust(names: list[str] | None, threshold: int) -> signing.Trust:
    paths = [signing.find_key(name, ".pub") for name in names] if names else [signing.find_key(None, ".pub")]
    keys = tuple(signing.load_public(path) for path in paths if path is not None)
    if len({key.keyid for key in keys}) < len(keys):
        raise UsageError("--trust names one key twice")
    if not keys:
        log.warning("this bundle trusts no key, so its devices can never be updated: make one with sdlora-edge keys new NAME")
    elif threshold > len(keys):
        raise UsageError(f"--threshold {threshold} cannot be met by {len(keys)} key(s)")
    return signing.Trust(keys, threshold)


def _write_graph(run: Run, weights: dict[str, np.ndarray], folder: Path) -> None:
    """model.onnx, whose graph inputs beside `pictures` have the stored weights as defaults."""
    backbone = run.backbone.cpu().eval()
    adapted = {name: torch.from_numpy(w) for name, w in weights.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}
    example = torch.zeros(2, 3, run.preprocessing.size, run.preprocessing.size)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    # two rows stand for any number: a dimension of 1 would be taken as fixed
    width = weights[HEAD_WEIGHT].shape[1]
    head = torch.zeros(2, width), torch.zeros(2)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Functional(backbone).eval(),
            (example, adapted, *head),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes=(dynamic, dict.fromkeys(adapted), dynamic, dynamic),
        )
    if program is None:
        raise InputError(f"{run.config.backbone} cannot be exported: torch.onnx.export returned nothing")
    model = program.model_proto
    _rename(model.graph, ["pictures", *adapted, HEAD_WEIGHT, HEAD_BIAS], ["logits"], ["batch", "classes"])
    for node in model.graph.node:  # where torch traced it: paths of this machine, and a third of a small model's bytes
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    _store_externally(model.graph, folder / WEIGHTS)
    files.write(folder / MODEL, model.SerializeToString())
    onnx.checker.check_model(str(folder / MODEL))


def _rename(graph: Any, inputs: list[str], outputs: list[str], dynamic: list[str]) -> None:
    """Give inputs, outputs and the dynamic dimensions their names: those of the backbone's own parameters."""
    names = dict(zip([v.name for v in (*graph.input, *graph.output)], [*inputs, *outputs], strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    old = [graph.input[0].type.tensor_type.shape.dim[0].dim_param, graph.input[-1].type.tensor_type.shape.dim[0].dim_param]
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in old:
                dim.dim_param = dynamic[old.index(dim.dim_param)]


def _store_externally(graph: Any, path: Path) -> None:
    """Defaults for every graph input but the first, as external data inside a safetensors file beside the model."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    for value in graph.input[1:]:
        entry = table[value.name]
        start, stop = entry["data_offsets"]
        tensor = TensorProto(name=value.name, data_type=TensorProto.FLOAT, dims=entry["shape"], data_location=TensorProto.EXTERNAL)
        for key, text in {"location": path.name, "offset": str(8 + length + start), "length": str(stop - start)}.items():
            tensor.external_data.add(key=key, value=text)
        graph.initializer.append(tensor)

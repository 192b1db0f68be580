"""A run's low-rank updates as an adapter of the `peft` library. `from_peft` goes the other way.

    adapter_config.json         LoRA with lora_alpha = r everywhere: what peft calls scaling is 1,
                                because magnitudes are folded into B
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight
                                    A, float32 (rank, columns) or (rank, columns, 1, 1)
                                base_model.model.<module>.lora_B.weight
                                    B, float32 (rows, rank) or (rows, rank, 1, 1)
                                base_model.model.<classifier>.weight, .bias
                                    the head, in `modules_to_save`
    sdlora_edge_head.safetensors
                                head.weight (rows, features), head.bias (rows,): the head
                                instead, if it sees more than the classifier does
    sdlora_edge.json            what peft has no place for: model, what the head sees, task, state
                                digest, all magnitudes, the classes of the head

The adapter applies to W_0, the backbone as it was before the first task: its published weights, or
those of the base session (backbone.safetensors of the run). The bundle's task does not matter.
Modules have the names of timm's model, or of the encoder that transformers' AutoModel makes.
Magnitudes of old directions change with every task, so there are two adapters to choose from:

    the whole update   W_t - W_0 = sum_k alpha_k(t) B_k A_k: all directions side by side along the
                       rank (peft calls this `cat`), with the head. A module's rank is the sum of
                       the ranks of its directions: four tasks of rank 10 on query and value of a
                       fused qkv give 80, because no smaller A holds both. Loaded, it computes
                       what the device computes at task t.
    one direction      alpha_t(t) B_t A_t alone, of its own rank, without the head. From such
                       adapters, peft's add_weighted_adapter(..., "cat") with the weights
                       alpha_k(t) / alpha_k(k) makes the whole update again.

timm's classifier sees what the backbone returns. A head of other features (`method.features`, such
as cls:4) does not fit into it, so it stands in a file of its own. Load the adapter, merge it, and
compute `Extractor(model, FeatureSpec.parse("cls:4"))(images) @ weight.T + bias`; without this
package, compute the tokens by timm's `forward_intermediates`. An encoder of texts has no
classifier: its head always stands in that file.

Rows of a fused qkv: if query and value are adapted and the key is not, A holds both A_q and A_v,
and B is zero outside its two blocks:

    A = [A_q; A_v]    B = [[B_q, 0], [0, 0], [0, B_v]]
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from torch import nn

from ..acceptance import Standing, accept_update
from ..device.chain import follow_trust, open_packet
from ..errors import InputError, NothingToDo, TrustError
from ..formats.bundle import HEAD_BIAS, HEAD_WEIGHT, Bundle, open_bundle
from ..formats.control import Revocation, Rotation
from ..formats.encoding import Factors
from ..formats.packet import Packet
from ..formats.signing import Trust
from ..inputs.modality import kind_in, of_kind
from ..method import backbones
from ..method.feature_spec import LAST
from ..progress import stage
from ..results import Result
from ..state import Projection, TaskState
from ..storage import atomic
from .peft_config import CONFIG
from .peft_modules import classifier_of, module_of, warn_of_bypassed

log = logging.getLogger("sdlora_edge")
MODEL, FACTS = "adapter_model.safetensors", "sdlora_edge.json"
HEAD = "sdlora_edge_head.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModel:
    """What an adapter applies to.

    Attributes:
        name: timm's, or the encoder's.
        size: side of its images in pixels. None: it is not timm's.
        projections: the adapted slices.
        features: what the head sees, as text.
        shapes: of the adapted weights, by name, if it is not timm's.
    """

    name: str
    size: int | None
    projections: Sequence[Projection]
    features: str = str(LAST)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenAdapter(Result):
    """An adapter's folder.

    Attributes:
        adapter: the folder.
        lineage: of the run. None if nobody said.
        model: the backbone's name.
        task, state: number of the last task, and digest of its state.
        alone: it holds that task's direction only.
        magnitudes: of all directions.
        classes: in the order of the head's rows; None for a retired class.
        rank: the largest of all modules.
        modules: how many are adapted.
        head: the classifier's module, or HEAD, the file of a head that the classifier cannot be.
            None: the adapter has no head.
        bytes: of all its files.
    """

    adapter: Path
    lineage: str | None
    model: str
    task: int
    state: str
    alone: bool
    magnitudes: tuple[Any, ...]
    classes: tuple[str | None, ...]
    rank: int
    modules: int
    head: str | None
    bytes: int


def to_peft(
    bundle_path: Path,
    packets: Sequence[Path],
    out: Path,
    alone: bool = False,
    after: Sequence[Path] = (),
) -> WrittenAdapter:
    """Write the adapter of the state that packets take a bundle to.

    Args:
        bundle_path: the bundle.
        packets: every packet after the bundle's task, in order.
        out: the new folder.
        alone: write the last task's direction instead of the whole update.
        after: the trust packets that the devices have applied before or between these packets, in
            order.

    Raises:
        NothingToDo: there is no direction: no task yet, or an absorbed one.
        UsageError: `out` exists.
        TrustError, NotForThisDevice, InputError: a device would refuse a packet.
    """
    bundle = open_bundle(bundle_path)
    state, factors = _follow(bundle, packets, after)
    manifest = bundle.manifest
    of_timm = of_kind(kind_in(manifest.preprocessing)).spatial
    size = manifest.preprocessing["size"] if of_timm else None
    shapes = {name: weight.shape for name, weight in bundle.weights.items()}
    model = AdaptedModel(manifest.model, size, manifest.projections, manifest.features, shapes)
    return replace(write_adapter(model, state, factors, out, alone), lineage=manifest.lineage)


def write_adapter(
    model: AdaptedModel,
    state: TaskState,
    factors: Sequence[Mapping[str, Factors]],
    out: Path,
    alone: bool = False,
) -> WrittenAdapter:
    """Write the adapter of a task's state.

    Args:
        model: what the adapter applies to.
        state: after task t.
        factors: of the tasks 1 to t.
        out: the new folder.
        alone: write the direction of task t only, without the head.

    Raises:
        NothingToDo: there is no direction.
        UsageError: `out` exists.
    """
    magnitudes = state.magnitudes.copy()
    if alone:
        magnitudes[:-1] = 0
    backbone = _of_timm(model)
    own = backbone.named_parameters() if backbone is not None else ()
    shapes = {name: weight.shape for name, weight in own} or model.shapes
    tensors = _stacked(model.projections, factors, magnitudes, shapes)
    if not tensors:
        what = "no direction of its own" if alone and state.task else "no directions yet"
        raise NothingToDo(
            f"task {state.task} has {what}: there is nothing that an adapter could hold"
        )
    ranks = {module: len(A) for module, (A, _) in tensors.items()}
    wide, classifier = not alone, None
    if backbone is not None:
        warn_of_bypassed(backbone, list(tensors), model.size)
        wide = not alone and state.head_weight.shape[1] != backbones.features(backbone)
        classifier = None if alone or wide else classifier_of(model.name)
    with atomic.new_folder(out) as folder:
        config = json.dumps(_config(ranks, classifier), indent=1)
        atomic.write(folder / CONFIG, config.encode() + b"\n")
        facts = json.dumps(_facts(model, state, alone), indent=1)
        atomic.write(folder / FACTS, facts.encode() + b"\n")
        stored = _named(tensors, state, classifier)
        atomic.write(folder / MODEL, safetensors.numpy.save(stored, {"format": "pt"}))
        if wide:
            _write_head(folder, state, model.features)
    return WrittenAdapter(
        adapter=out,
        lineage=None,
        model=model.name,
        task=state.task,
        state=state.digest,
        alone=alone,
        magnitudes=tuple(state.magnitudes.tolist()),
        classes=state.classes,
        rank=max(ranks.values()),
        modules=len(ranks),
        head=HEAD if wide else classifier,
        bytes=sum(path.stat().st_size for path in out.iterdir()),
    )


def _of_timm(model: AdaptedModel) -> nn.Module | None:
    if model.size is None:
        return None
    with stage(f"building {model.name}"):
        return backbones.create(model.name, model.size, None, pretrained=False)[0]


def _facts(model: AdaptedModel, state: TaskState, alone: bool) -> dict[str, Any]:
    """What peft has no place for."""
    return {
        "model": model.name,
        "features": model.features,
        "task": state.task,
        "state": state.digest,
        "alone": alone,
        "magnitudes": state.magnitudes.tolist(),
        "classes": list(state.classes),
    }


def _write_head(folder: Path, state: TaskState, features: str) -> None:
    """Write the head that no classifier of the backbone can be."""
    log.warning(
        "the head sees %s, which the backbone's classifier does not: it is written to %s",
        features,
        HEAD,
    )
    weight, bias = map(np.ascontiguousarray, (state.head_weight, state.head_bias))
    head = {HEAD_WEIGHT: weight, HEAD_BIAS: bias}
    atomic.write(folder / HEAD, safetensors.numpy.save(head))


def _named(
    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]], state: TaskState, classifier: str | None
) -> dict[str, np.ndarray]:
    """All tensors by the names that peft gives them, float32."""
    stored = {
        f"{PREFIX}{module}.lora_{part}.weight": tensor
        for module, pair in tensors.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    if classifier:
        stored[f"{PREFIX}{classifier}.weight"] = state.head_weight
        stored[f"{PREFIX}{classifier}.bias"] = state.head_bias
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in stored.items()}


def _follow(
    bundle: Bundle, packets: Sequence[Path], after: Sequence[Path]
) -> tuple[TaskState, list[Mapping[str, Factors]]]:
    """The state after the packets, and the factors of all its tasks.

    Every packet is verified as a device verifies it.
    """
    state, factors = bundle.state, list(bundle.factors)
    keys = [bundle.trust]
    for one in after:
        keys.append(follow_trust(keys[-1], [one]))
    for path in packets:
        packet, keys = _opened(path, bundle, keys)
        if not isinstance(packet, Packet):
            raise InputError(f"{path} holds no task: name only packets that do")
        standing = Standing(bundle.manifest.lineage, bundle.manifest.projections, state)
        state = accept_update(packet, standing)
        factors += [update.factors for update in packet.updates]
    return state, factors


def _opened(
    path: Path, bundle: Bundle, keys: list[Trust]
) -> tuple[Packet | Rotation | Revocation, list[Trust]]:
    """A packet, and the keys that packets after it may be signed with: those in force with it, and
    later ones."""
    refused = None
    for place, trust in enumerate(keys):
        try:
            return open_packet(path, bundle, trust), keys[place:]
        except TrustError as error:
            refused = error
    raise TrustError(
        f"{refused}; or name the trust packets that the devices have applied with --after"
    ) from refused


def _stacked(
    projections: Sequence[Projection],
    factors: Sequence[Mapping[str, Factors]],
    magnitudes: np.ndarray,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by module, float32, in peft's shapes.

    All projections and tasks stand side by side; magnitudes are folded into B.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for i, p in enumerate(projections):
        own = magnitudes if magnitudes.ndim == 1 else magnitudes[:, i]
        for f, magnitude in zip(factors, own, strict=True):
            if p.name in f and magnitude != 0:
                B = np.zeros((shapes[p.tensor][0], f[p.name].B.shape[1]), np.float32)
                B[p.start : p.stop] = f[p.name].B.astype(np.float32) * np.float32(magnitude)
                parts.setdefault(p.tensor, []).append((f[p.name].A.astype(np.float32), B))
    found = {}
    for tensor, pairs in parts.items():
        A, B = np.concatenate([A for A, _ in pairs]), np.concatenate([B for _, B in pairs], axis=1)
        pointwise = (1,) * (len(shapes[tensor]) - 2)
        found[module_of(tensor)] = (
            A.reshape(*A.shape, *pointwise),
            B.reshape(*B.shape, *pointwise),
        )
    return found


def _config(ranks: Mapping[str, int], classifier: str | None) -> dict[str, Any]:
    r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "modules_to_save": [classifier] if classifier else None,
    }

"""A run's low-rank updates as an adapter of the `peft` library, and an adapter trained elsewhere as the next task of a run.

    adapter_config.json         LoRA, lora_alpha = r everywhere: what peft calls scaling is 1, magnitudes are folded into B
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight   A   float32 (rank, columns), or (rank, columns, 1, 1)
                                base_model.model.<module>.lora_B.weight   B   float32 (rows, rank), or (rows, rank, 1, 1)
                                base_model.model.<classifier>.weight, .bias   the head, in `modules_to_save`
    sdlora_edge.json            what peft does not ask for: model, task, state digest, all magnitudes, the classes of the head

The adapter applies to W_0: the backbone as it was before the first task, timm's own weights or those of the base session
(backbone.safetensors of the run), whatever task the bundle was exported at. Magnitudes of old directions change with every task, so
two things can be written:

    the whole update   W_t - W_0 = sum_k alpha_k(t) B_k A_k: all directions side by side along the rank (what peft calls `cat`), with
                       the head. A module's rank is the sum of the ranks of all its directions: four tasks of rank 10 on query and
                       value of a fused qkv give 80, for no smaller A holds both. Loaded, it computes what the device does at task t.
    one direction      alpha_t(t) B_t A_t alone, of its own rank, without the head. peft's add_weighted_adapter(..., "cat")
                       with the weights alpha_k(t) / alpha_k(k) makes the whole update of such adapters again.

Rows of a fused qkv: where query and value are adapted and the key is not, A holds both A_q and A_v, and B is zero but for its two blocks:

    A = [A_q; A_v]    B = [[B_q, 0], [0, 0], [0, B_v]]
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import timm
import torch
from torch import nn

from ..acceptance import Standing, accept_update
from ..device.chain import follow_trust, open_packet
from ..errors import InputError, NothingToDo, TrustError
from ..formats.bundle import Bundle, open_bundle
from ..formats.control import Revocation, Rotation
from ..formats.encoding import encode
from ..formats.packet import LIMITS, Packet
from ..formats.signing import Trust
from ..method import backbones
from ..state import Factors, Projection, TaskState, round_magnitudes
from ..storage import atomic
from ..train import plan
from ..train.loop import Direction, Report, learn
from ..train.run import Run
from .peft_config import CONFIG, AdapterConfig

log = logging.getLogger("sdlora_edge")
MODEL, PICKLE, FACTS = "adapter_model.safetensors", "adapter_model.bin", "sdlora_edge.json"
PREFIX = "base_model.model."
ROUNDING = {"fp32": 0.01, "fp16": 0.01, "int8": 0.05, "int4": 0.3}
"""the largest share of an adapter's norm that each encoding may take away"""


# --- to peft ------------------------------------------------------------------------------------------------------------------


def to_peft(
    bundle_path: Path,
    packets: Sequence[Path],
    out: Path,
    alone: bool = False,
    after: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the adapter of the state that the packets, first to last, take the bundle to, into the new folder `out`.

    alone: the last task's direction instead of the whole update. after: the trust packets that the devices have applied, in order,
    before or between these packets. Raises what a device raises for packets it would refuse, NothingToDo where there is no
    direction (no task yet, or an absorbed one), UsageError where `out` exists.
    """
    bundle = open_bundle(bundle_path)
    state, factors = _follow(bundle, packets, after)
    manifest = bundle.manifest
    written = write_adapter(
        state,
        factors,
        manifest.projections,
        manifest.model,
        manifest.preprocessing["size"],
        out,
        alone,
    )
    return {"adapter": str(out), "lineage": manifest.lineage, **written}


def write_adapter(
    state: TaskState,
    factors: Sequence[Mapping[str, Factors]],
    projections: Sequence[Projection],
    model: str,
    size: int,
    out: Path,
    alone: bool = False,
) -> dict[str, Any]:
    """The adapter of a task's state; factors: of the tasks 1 to t. model, size: timm's name and the images' side.

    Returns what sdlora_edge.json holds, and `rank` (the largest), `modules`, `head` (the classifier's module) and `bytes`.
    """
    backbone, _ = backbones.create(model, size, None, pretrained=False)
    magnitudes = state.magnitudes.copy()
    if alone:
        magnitudes[:-1] = 0
    tensors = _stacked(projections, factors, magnitudes, backbone)
    if not tensors:
        what = "no direction of its own" if alone and state.task else "no directions yet"
        raise NothingToDo(
            f"task {state.task} has {what}: there is nothing that an adapter could hold"
        )
    ranks = {module: len(A) for module, (A, _) in tensors.items()}
    classifier = None if alone else _classifier(model)
    stored = {
        f"{PREFIX}{m}.lora_{part}.weight": t
        for m, pair in tensors.items()
        for part, t in zip("AB", pair, strict=True)
    }
    if classifier:
        stored |= {
            f"{PREFIX}{classifier}.weight": state.head_weight,
            f"{PREFIX}{classifier}.bias": state.head_bias,
        }
    for module in _bypassed(backbone, list(tensors), size):
        log.warning(
            "timm reads %s.weight without calling the layer: in peft, call merge_and_unload() for it to count",
            module,
        )
    facts = {"model": model, "task": state.task, "state": state.digest, "alone": alone}
    facts |= {"magnitudes": state.magnitudes.tolist(), "classes": list(state.classes)}
    with atomic.new_folder(out) as folder:
        atomic.write(
            folder / CONFIG, json.dumps(_config(ranks, classifier), indent=1).encode() + b"\n"
        )
        atomic.write(folder / FACTS, json.dumps(facts, indent=1).encode() + b"\n")
        contiguous = {name: np.ascontiguousarray(t, np.float32) for name, t in stored.items()}
        atomic.write(folder / MODEL, safetensors.numpy.save(contiguous, {"format": "pt"}))
    size_on_disk = sum(path.stat().st_size for path in out.iterdir())
    return {
        **facts,
        "rank": max(ranks.values()),
        "modules": len(ranks),
        "head": classifier,
        "bytes": size_on_disk,
    }


def _follow(
    bundle: Bundle, packets: Sequence[Path], after: Sequence[Path]
) -> tuple[TaskState, list[Mapping[str, Factors]]]:
    """The state after the packets, and the factors of all its tasks; every packet is verified as a device does it."""
    state, factors = bundle.state, list(bundle.factors)
    keys = [bundle.trust]
    for one in after:
        keys.append(follow_trust(keys[-1], [one]))
    for path in packets:
        packet, keys = _opened(path, bundle, keys)
        if not isinstance(packet, Packet):
            raise InputError(f"{path} brings no task: name packets of tasks only")
        standing = Standing(bundle.manifest.lineage, bundle.manifest.projections, state)
        state = accept_update(packet, standing)
        factors += [update.factors for update in packet.updates]
    return state, factors


def _opened(
    path: Path, bundle: Bundle, keys: list[Trust]
) -> tuple[Packet | Rotation | Revocation, list[Trust]]:
    """A packet, and the keys that those after it may be signed with: the keys of its own time, and later ones."""
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
    backbone: nn.Module,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by module, float32, in the shapes peft gives them: all projections and tasks side by side, magnitudes folded into B."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for i, p in enumerate(projections):
        own = magnitudes if magnitudes.ndim == 1 else magnitudes[:, i]
        for f, magnitude in zip(factors, own, strict=True):
            if p.name in f and magnitude != 0:
                B = np.zeros(
                    (len(backbone.get_parameter(p.tensor)), f[p.name].B.shape[1]), np.float32
                )
                B[p.start : p.stop] = f[p.name].B.astype(np.float32) * np.float32(magnitude)
                parts.setdefault(p.tensor, []).append((f[p.name].A.astype(np.float32), B))
    found = {}
    for tensor, pairs in parts.items():
        A, B = np.concatenate([A for A, _ in pairs]), np.concatenate([B for _, B in pairs], axis=1)
        pointwise = (1,) * (backbone.get_parameter(tensor).ndim - 2)
        found[tensor.removesuffix(".weight")] = (
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


def _classifier(model: str) -> str | None:
    """The module that timm puts the head into."""
    found = (
        "head"
        if model == backbones.MICRO
        else timm.models.get_pretrained_cfg_value(model, "classifier")
    )
    if not isinstance(found, str):
        log.warning(
            "timm's %s has no single classifier (%s): the adapter comes without the head",
            model,
            found,
        )
        return None
    return found


@torch.no_grad()
def _bypassed(backbone: nn.Module, modules: Sequence[str], size: int) -> list[str]:
    """Those modules whose weight the backbone takes without calling them: an adapter beside them would not be called either."""
    called: set[str] = set()
    hooks = [
        backbone.get_submodule(m).register_forward_hook(lambda *_, name=m: called.add(name))
        for m in modules
    ]
    backbone(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return [m for m in modules if m not in called]


# --- from peft ----------------------------------------------------------------------------------------------------------------


def from_peft(
    path: Path,
    run_path: Path,
    data: str,
    name: str | None = None,
    report: Report = lambda run: None,
) -> Run:
    """Make an adapter the next task of a run, and fit the head to `data`'s images as the run fits its heads.

    The direction is added to the run's own: W_t = W_{t-1} + scaling B A, old magnitudes as they are. Raises InputError for an
    adapter that cannot be read or represented (naming why), UsageError where the run does not take one, and what
    `check.one_more` and `trainer.learn` raise.
    """
    plan.adapter(path, run_path)
    return add(path, plan.one_more(run_path, data, name or path.resolve().name), report)


def add(path: Path, task: plan.NewTask, report: Report = lambda run: None) -> Run:
    """`from_peft`, of a task that was checked."""
    run = Run.open(task.run)
    direction = _normalised(read_adapter(path, run), run, path)
    return learn(task, report, direction, f"packet from-peft {path}")


def read_adapter(path: Path, run: Run) -> dict[str, Factors]:
    """The direction in an adapter folder, float32 factors by the run's projections, peft's scaling folded into B.

    Raises InputError where the folder is no LoRA adapter in safetensors, or holds anything that factors of these projections
    cannot represent; the message names it.
    """
    config = AdapterConfig.read(path)
    tensors = _tensors(path)
    classifier = None if config.modules_to_save == () else _classifier(run.config.backbone.backbone)
    if unknown := set(config.modules_to_save) - {classifier}:
        raise InputError(
            f"{path} also replaces whole modules (modules_to_save: {', '.join(sorted(unknown))}): train it without them"
        )
    heads = {f"{PREFIX}{classifier}.{part}" for part in ("weight", "bias")} if classifier else set()
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):
        if key in heads:
            continue
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not found or tensor.ndim not in (2, 4) or tensor.shape[2:] not in ((), (1, 1)):
            raise InputError(
                f"{path / MODEL} holds {key} {tensor.shape}, which is no factor of a linear layer or pointwise convolution"
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{path / MODEL}: {key} holds NaN or infinity")
        pairs.setdefault(found[1], {})[found[2]] = tensor.reshape(tensor.shape[:2])
    if heads:
        log.info("the adapter's own head is left aside: the run fits its head to the images")
    factors: dict[str, Factors] = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise InputError(
                f"{path / MODEL} has lora_{min(pair)} of {module} but not the other factor"
            )
        own = _adapted(path, module, run)
        factors |= _sliced(
            path, own, pair["A"], pair["B"] * config.scaling(module, pair["A"], pair["B"]), run
        )
    return factors


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / MODEL
    if not path.is_file() and (folder / PICKLE).exists():
        raise InputError(
            f"{folder / PICKLE} is a pickle, which can run any program when it is read: save it with safe_serialization=True"
        )
    try:
        return {
            name: tensor.float().numpy()
            for name, tensor in safetensors.torch.load(atomic.read(path)).items()
        }
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _adapted(path: Path, module: str, run: Run) -> list[Projection]:
    """The run's projections of one module. Raises InputError if there are none."""
    own = [p for p in run.projections if p.tensor == f"{module}.weight"]
    if not own:
        raise InputError(
            f"{path} adapts {module}, which {run.path} does not: it adapts "
            f"{', '.join(sorted({p.tensor.removesuffix('.weight') for p in run.projections})[:4])}, ...; "
            "train the adapter on those modules, or begin a run with other --targets"
        )
    return own


def _sliced(
    path: Path, own: Sequence[Projection], A: np.ndarray, B: np.ndarray, run: Run
) -> dict[str, Factors]:
    """One module's factors cut into those of its projections: each gets its rows of B, and the ranks that count there."""
    module = own[0].tensor.removesuffix(".weight")
    shape = run.base_weights[own[0].tensor].shape
    if (len(B), A.shape[1]) != shape:
        raise InputError(
            f"{path}: {module} has factors {A.shape} and {B.shape} for a weight of {shape}: it is of another backbone"
        )
    left, found = np.abs(B).max(axis=1, initial=0) > 0, {}
    for p in own:
        left[p.start : p.stop] = False
        rows = B[p.start : p.stop]
        counts = (rows != 0).any(axis=0) & (A != 0).any(axis=1)
        if counts.any():
            found[p.name] = Factors(A[counts], rows[:, counts])
    if left.any():
        first, last = np.flatnonzero(left)[[0, -1]]
        raise InputError(
            f"{path} changes rows {first} to {last} of {module}.weight too, of which {run.path} adapts only "
            f"{', '.join(f'{p.start} to {p.stop - 1} ({p.name})' for p in own)}: begin a run with --targets that take the whole of it"
        )
    return found


def _normalised(factors: Mapping[str, Factors], run: Run, path: Path) -> Direction:
    """The direction as the run's own are: of norm 1 (root mean square over projections), float32, the norm being alpha_t."""
    wide = run.config.method.magnitude_norm == "factors"
    squares = np.array(
        [
            np.square(_product(factors[p.name])).sum() if p.name in factors else 0.0
            for p in run.projections
        ]
    )
    norm = np.sqrt(squares if wide else np.full(len(squares), squares.mean()))
    if not norm.any():
        raise InputError(
            f"{path} changes nothing: all its factors B are zero; it was never trained"
        )
    if norm.max() > LIMITS.magnitude:
        raise InputError(
            f"{path} is of norm {norm.max():.3g}, beyond the {LIMITS.magnitude:g} that a magnitude may be"
        )
    found, error, encoding = {}, 0.0, run.config.method.encoding
    for p, N in zip(run.projections, norm, strict=True):
        if f := factors.get(p.name):
            try:
                with np.errstate(over="ignore"):  # encode refuses what this makes infinite
                    found[p.name] = encode(Factors(f.A, f.B / np.float32(N)), "fp32")
                shipped = encode(found[p.name], encoding)
            except ValueError as wrong:
                raise InputError(f"{path}: {p.name}: {wrong}") from wrong
            error += float(np.square(N * _product(shipped) - _product(f)).sum())
    if error > ROUNDING[encoding] ** 2 * squares.sum():
        raise InputError(
            f"{path} loses {100 * np.sqrt(error / squares.sum()):.0f} % in {encoding}: its A and B are of too different sizes"
        )
    deltas = np.zeros((len(run.states), *norm.shape) if wide else len(run.states))
    deltas[-1] = round_magnitudes(norm if wide else norm[0])
    return found, deltas


def _product(f: Factors) -> np.ndarray:
    return f.B.astype(np.float64) @ f.A.astype(np.float64)

"""From a run's state to the bundle that devices are flashed with, proved against torch before it gets its name."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..device import adapter
from ..device.engines import open_engine
from ..errors import HealthError, InputError, NotForThisDevice, UsageError
from ..formats import bundle
from ..formats.bundle import (
    CANARY_LOGITS,
    CLASSES,
    CONSTANTS,
    FACTORS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    INPUTS,
    MANIFEST,
    TRUST,
    Bundle,
    Manifest,
    classes_json,
    load_tensors,
    open_bundle,
)
from ..formats.canonical import dump_json, tensors_digest
from ..inputs import canary
from ..method import backbones
from ..state import TaskState, factor_tensors
from ..storage import atomic
from ..train import splits
from ..train.run import Run
from ..train.score import test_images_by_class
from . import executorch, onnx
from . import precision as precisions
from .metadata import metadata
from .parity import BATCH, Parity, compare, host_logits
from .requests import BundleRequest

log = logging.getLogger("sdlora_edge")
CANARY_SEED = 0
PARITY_IMAGES = 64
PARITY_IMAGES_QUANTISED = 512
CAPACITY = 1000
"""classes there is room for, where there must be a number and the user names none (twice those known, if more)"""


def export_bundle(
    run: Run,
    out: Path,
    task: int | None = None,
    trust: Sequence[str] | None = None,
    threshold: int = 1,
    *,
    target: str = "onnx",
    precision: str = "fp32",
    weights_as: str | None = None,
    max_classes: int | None = None,
    tolerance: float | None = None,
    min_agreement: float | None = None,
    also: str | None = None,
) -> dict[str, Any]:
    """Write the bundle of a run's state after `task` (default: the last) to the new folder `out`, proved against torch.

    trust: names or files of public keys; by default the only one in keys/. weights_as: `bundle.INPUTS` or CONSTANTS; by
    default the one that serves faster. max_classes: room in the head, which only inputs of an ONNX model need not have.
    tolerance, min_agreement: other bounds than the precision's own (`precision.PRECISIONS`). also: ADAPTER, for the merged
    weights as a file beside the bundle too.

    Raises UsageError where `out` exists, the state knows no class, a key is missing or options exclude each other;
    HealthError where the engine's logits differ from torch's by more than the bounds on test images or the canary.
    """
    request = BundleRequest(
        out,
        task,
        trust,
        threshold,
        target,
        precision,
        weights_as,
        max_classes,
        tolerance,
        min_agreement,
        also,
    )
    keys = request.require(run.path)
    if not keys.keys:
        log.warning(
            "this bundle trusts no key, so its devices can never be updated: make one with sdlora-edge keys new NAME"
        )
    state, bounds = run.state(task), precisions.named(precision)
    if target == "executorch" or (
        weights_as is None and backbones.convolutions(run.backbone, run.projections)
    ):
        weights_as = CONSTANTS
    weights_as = weights_as or INPUTS
    capacity = max_classes or (
        max(CAPACITY, 2 * len(state.classes)) if weights_as == CONSTANTS else 0
    )
    if also and weights_as != INPUTS:
        raise UsageError(
            f"--also {also} goes with --weights-as {INPUTS}, which is not the default of {run.config.backbone.backbone}: name it"
        )
    extra = request.adapter
    weights = run.weights(state.task) | {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
    facts = _facts(run, state) | {
        "target": target,
        "precision": precision,
        "tolerance": tolerance or bounds.tolerance,
        "min_agreement": bounds.agreement if min_agreement is None else min_agreement,
        "weights_as": weights_as,
        "capacity": capacity,
        "made_with": _made_with(target),
    }
    with atomic.new_folder(out) as folder:
        size = run.preprocessing.size
        if target == "onnx":
            places = onnx.write_model(
                run.backbone,
                size,
                weights,
                folder,
                precision,
                weights_as,
                capacity,
                metadata(facts, state),
            )
        else:
            places = executorch.write_program(
                run.backbone, size, weights, folder, precision, capacity
            )
        seen = host_logits(run, state.task, canary.inputs(CANARY_SEED, run.preprocessing))
        logits = {CANARY_LOGITS: np.ascontiguousarray(seen, np.float32)}
        atomic.write(folder / FACTORS, safetensors.numpy.save(_factors(run, state.task) | logits))
        atomic.write(folder / CLASSES, classes_json(state.classes))
        atomic.write(folder / TRUST, dump_json(keys.to_dict()))
        described = {path.name: bundle.describe(path) for path in sorted(folder.iterdir())}
        expected = bundle.Canary(CANARY_SEED, len(seen), bounds.canary)
        manifest = Manifest(**facts, weights=places, canary=expected, files=described)
        atomic.write(folder / MANIFEST, manifest.to_json())
        proved = check_bundle(run, folder, tolerance, min_agreement)
        opened = open_bundle(folder)
        if extra is not None:
            adapter.write_adapter(opened, weights, opened.state, extra)
    return {
        "bundle": str(out),
        **({"adapter": str(extra)} if extra is not None else {}),
        "id": opened.id,
        "task": state.task,
        "classes": list(state.classes),
        "target": target,
        "precision": precision,
        "weights_as": weights_as,
        "capacity": capacity,
        "model_bytes": opened.model_bytes,
        "trusted_keys": [key.keyid for key in keys.keys],
        **proved.to_dict(),
    }


def check_bundle(
    run: Run, path: Path, tolerance: float | None = None, min_agreement: float | None = None
) -> Parity:
    """Compare a bundle with its run: all that the manifest says of it, and what its engine computes, with torch, on the canary
    and on test images that can still be read. tolerance, min_agreement: other bounds than the manifest's own.

    Raises HealthError where the engine differs by more than the bounds, InputError where the manifest says something else than
    the run, NotForThisDevice for another run's bundle.
    """
    opened = open_bundle(path)
    manifest, bounds, run = (
        opened.manifest,
        precisions.named(opened.manifest.precision),
        run.encoded(opened.manifest.encoding),
    )
    if manifest.lineage != run.lineage or run.state(manifest.task).digest != manifest.state:
        raise NotForThisDevice(
            f"{path} was not exported from {run.path}: name the run it came from with --run"
        )
    for name, value in _facts(run, run.state(manifest.task)).items():
        if _plain(value) != _plain(getattr(manifest, name)):
            raise InputError(
                f"{path / MANIFEST} was changed: its {name} is not that of {run.path}; export the bundle again"
            )
    if opened.state.classes != run.state(manifest.task).classes:
        raise InputError(
            f"{path / CLASSES} was changed: it does not hold the classes of {run.path}; export the bundle again"
        )
    stored = load_tensors(path / FACTORS)
    stored.pop(CANARY_LOGITS)
    if tensors_digest(stored) != tensors_digest(_factors(run, manifest.task)):
        raise InputError(
            f"{path / FACTORS} was changed: it does not hold the factors of {run.path}; export the bundle again"
        )
    inputs = canary.inputs(manifest.canary.seed, run.preprocessing, manifest.canary.count)
    known = len(inputs)
    pixels = _some_pixels(
        run, manifest.task, PARITY_IMAGES_QUANTISED if bounds.quantised else PARITY_IMAGES
    )
    if len(pixels):
        inputs = np.concatenate([inputs, run.preprocessing.normalise(pixels)])
    else:
        log.warning("no test image can be read: the exported model is compared on its canary only")
    logits, reference = engine_logits(opened, inputs), host_logits(run, manifest.task, inputs)
    if canary.largest_difference(opened.canary_logits, reference[:known]) > 1e-5:
        raise InputError(
            f"{path / FACTORS} was changed: its canary is not what {run.path} computes; export the bundle again"
        )
    allowed = manifest.tolerance if tolerance is None else tolerance
    agreement = manifest.min_agreement if min_agreement is None else min_agreement
    found = compare(logits, reference).require(
        allowed, agreement, bounds.unit, f"the {manifest.precision} model"
    )
    if (
        difference := canary.largest_difference(logits[:known], reference[:known])
    ) > manifest.canary.tolerance:
        raise HealthError(
            f"the {manifest.precision} model fails its canary: {difference:.2g} (allowed {manifest.canary.tolerance:g})"
        )
    return found


def _facts(run: Run, state: TaskState) -> dict[str, Any]:
    """What the manifest says that the run alone decides."""
    return {
        "states": state.states,
        "task_name": state.name,
        "model": run.config.backbone.backbone,
        "encoding": run.config.method.encoding,
        "revisions": tuple(run.revision(task) for task in range(1, state.task + 1)),
        "magnitudes": tuple(state.magnitudes.tolist()),
        "preprocessing": run.preprocessing.to_manifest(),
        "projections": run.projections,
    }


def _plain(value: Any) -> bytes:
    """For comparing a value with what comes back from JSON."""
    return dump_json(
        {
            "": [asdict(p) for p in value]
            if value and isinstance(value, tuple) and is_dataclass(value[0])
            else value
        }
    )


def _factors(run: Run, task: int) -> dict[str, np.ndarray]:
    """The factors of the tasks up to `task`, by their names in FACTORS."""
    return {
        f"{k}.{n}": np.ascontiguousarray(t)
        for k, f in enumerate(run.factors(task), 1)
        for n, t in factor_tensors(f).items()
    }


def engine_logits(opened: Bundle, inputs: np.ndarray) -> np.ndarray:
    """What a bundle's engine computes in the bundle's own state: float32 (N, 3, size, size) to (N, live classes)."""
    with tempfile.TemporaryDirectory() as workspace:
        engine = open_engine(opened, 0, Path(workspace))
        loaded = engine.load(
            {
                **opened.weights,
                HEAD_WEIGHT: opened.state.head_weight,
                HEAD_BIAS: opened.state.head_bias,
            }
        )
        parts = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
        found = np.concatenate([engine.run(loaded, part) for part in parts])
        return found[:, opened.state.live]


def _some_pixels(run: Run, task: int, count: int) -> np.ndarray:
    """Up to `count` test images, spread over the classes."""
    by_class = test_images_by_class(run, task)
    each = -(-count // max(1, len(by_class)))
    few = {c: images[:each] for c, images in by_class.items()}
    return splits.decode(few, list(few), run.preprocessing, need=False).pixels[:count]


def _made_with(target: str) -> dict[str, Any]:
    if target == "executorch":
        return {name: version(name) for name in ("torch", "timm", "executorch")}
    return {
        "onnx_opset": onnx.OPSET,
        **{name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
    }

"""From a run's state to the bundle that devices are flashed with.

A bundle is proved against torch before it gets its name.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..device.engines import open_engine
from ..device.export_weights import write_weights
from ..errors import HealthError, InputError, NotForThisDevice, UsageError
from ..formats import bundle
from ..formats.bundle import (
    CANARY_LOGITS,
    CLASSES,
    CONSTANTS,
    FACTORS,
    FLEET_ROOT,
    HEAD_BIAS,
    HEAD_WEIGHT,
    INPUTS,
    MANIFEST,
    PLAIN_INPUTS,
    TRUST,
    Bundle,
    Manifest,
    classes_json,
    load_tensors,
    open_bundle,
)
from ..formats.canonical import dump_json, parse_json, tensors_digest
from ..formats.manifest import FLEET_ROOT_LIMIT
from ..formats.signing import Trust
from ..inputs import canary
from ..inputs.modality import Inputs, joined, parts
from ..method import backbones
from ..progress import stage
from ..results import Result
from ..state import TaskState, factor_tensors
from ..storage import atomic
from ..train import splits
from ..train.run import Run
from ..train.score import test_images_by_class
from . import executorch, onnx
from . import precision as precisions
from .form import ModelForm
from .metadata import metadata
from .parity import BATCH, Parity, compare, host_logits
from .requests import BundleRequest, ExportOptions

log = logging.getLogger("sdlora_edge")
CANARY_SEED = 0
CANARY_ROUNDING = 1e-5
"""largest difference of canary logits between two computations by torch"""
PARITY_IMAGES = 64
PARITY_IMAGES_QUANTISED = 512
CAPACITY = 1000
"""rows of a head that must have a fixed number, if the user names none (or twice those known)"""


@dataclass(frozen=True)
class BundleExport(Result):
    """A bundle that was written. adapter: the file beside it, if one was asked for."""

    bundle: Path
    adapter: Path | None
    id: str
    task: int
    classes: tuple[str, ...]
    target: str
    precision: str
    weights_as: str
    capacity: int
    model_bytes: int
    trusted_keys: tuple[str, ...]
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """One level: the parity's facts stand beside the others."""
        shown = super().to_dict()
        if self.adapter is None:
            del shown["adapter"]
        parity: dict[str, Any] = shown.pop("parity")
        return shown | parity


def export_bundle(
    run: Run | Path | str,
    out: Path | str,
    task: int | None = None,
    trust: Sequence[Path | str] | None = None,
    options: ExportOptions | None = None,
) -> BundleExport:
    """Write the bundle of a run's state, and prove that it computes what torch computes.

    Args:
        run: the run, or its folder.
        out: the new folder.
        task: export the state after this task. Default: the last.
        trust: names or files of public keys. Default: the only one in keys/.
        options: precision, target and the rest.

    Raises:
        UsageError: `out` exists, the state knows no class, a key is missing, or options exclude
            each other.
        HealthError: the engine's logits differ from torch's by more than the bounds, on test images
            or on the canary.
    """
    opened = run if isinstance(run, Run) else Run.open(Path(run))
    request = BundleRequest(Path(out), task, trust, options or ExportOptions())
    return export(opened, request, request.require(opened.path))


def export(run: Run, request: BundleRequest, keys: Trust) -> BundleExport:
    """`export_bundle`, of a request that was checked."""
    if not keys.keys:
        log.warning(
            "this bundle trusts no key, so its devices can never be updated: make one with "
            "sdlora-edge keys new NAME"
        )
    state, options = run.state(request.task), request.options
    form = _form(run, state, options)
    weights = run.weights(state.task) | {HEAD_WEIGHT: state.head_weight, HEAD_BIAS: state.head_bias}
    facts = _facts(run, state) | _choices(options, form)
    with atomic.new_folder(request.out) as folder:
        if options.target == "onnx":
            with stage("exporting to ONNX"):
                places = onnx.write_model(
                    run.backbone, weights, folder, form, metadata(facts, state)
                )
        else:
            with stage("exporting to ExecuTorch"):
                places = executorch.write_program(run.backbone, weights, folder, form)
        seen = host_logits(run, state.task, canary.inputs(CANARY_SEED, run.preprocessing))
        logits = {CANARY_LOGITS: np.ascontiguousarray(seen, np.float32)}
        stored = _stored(run, state) | logits
        atomic.write(folder / FACTORS, safetensors.numpy.save(stored))
        atomic.write(folder / CLASSES, classes_json(state.classes))
        for name, data in run.preprocessing.files.items():
            atomic.write(folder / name, data)
        atomic.write(folder / TRUST, dump_json(keys.to_dict()))
        if options.fleet_root is not None:
            atomic.write(folder / FLEET_ROOT, _root_of(options.fleet_root))
        described = {path.name: bundle.describe(path) for path in sorted(folder.iterdir())}
        expected = bundle.Canary(CANARY_SEED, len(seen), precisions.named(form.precision).canary)
        manifest = Manifest(**facts, weights=places, canary=expected, files=described)
        atomic.write(folder / MANIFEST, manifest.to_json())
        proved = check_bundle(run, folder, options.tolerance, options.min_agreement)
        opened = open_bundle(folder)
        if request.adapter is not None:
            write_weights(opened, weights, opened.state, ("adapter", request.adapter))
    return BundleExport(
        bundle=request.out,
        adapter=request.adapter,
        id=opened.id,
        task=state.task,
        classes=state.names,
        target=options.target,
        precision=form.precision,
        weights_as=form.weights_as,
        capacity=form.capacity,
        model_bytes=opened.model_bytes,
        trusted_keys=tuple(key.keyid for key in keys.keys),
        parity=proved,
    )


def _root_of(path: Path) -> bytes:
    """The bytes of a repository's root of trust. Raises InputError for another file."""
    data = atomic.receive(path, FLEET_ROOT_LIMIT)
    signed = parse_json(data, str(path)).get("signed")
    if not isinstance(signed, dict) or signed.get("_type") != "root":
        raise InputError(f"{path} is no root of trust: name a fleet repository's 1.root.json")
    return data


def _choices(options: ExportOptions, form: ModelForm) -> dict[str, Any]:
    """The fields of the manifest that the user decides, with their defaults."""
    bounds, agreement = precisions.named(form.precision), options.min_agreement
    return {
        "target": options.target,
        "precision": form.precision,
        "tolerance": options.tolerance or bounds.tolerance,
        "min_agreement": bounds.agreement if agreement is None else agreement,
        "weights_as": form.weights_as,
        "capacity": form.capacity,
        "made_with": _made_with(options.target),
    }


def _form(run: Run, state: TaskState, options: ExportOptions) -> ModelForm:
    """The model's form, with the defaults of this backbone. Raises UsageError."""
    constants = options.target == "executorch" or (
        # convolutions run faster with constants
        options.weights_as is None and backbones.convolutions(run.backbone, run.projections)
    )
    weights_as = CONSTANTS if constants else options.weights_as or INPUTS
    if options.runs_in is not None:
        weights_as = PLAIN_INPUTS
    if options.also and weights_as != INPUTS:
        raise UsageError(
            f"--also {options.also} needs weights as {INPUTS}, which is not the default of "
            f"{run.config.backbone.backbone}: add --weights-as {INPUTS}"
        )
    room = max(CAPACITY, 2 * len(state.classes)) if weights_as == CONSTANTS else 0
    return ModelForm(
        run.preprocessing,
        options.precision,
        weights_as,
        options.max_classes or room,
        run.features,
    )


def check_bundle(
    run: Run, path: Path, tolerance: float | None = None, min_agreement: float | None = None
) -> Parity:
    """Compare a bundle with its run, and its engine with torch.

    What the manifest says must be what the run says. The engine must compute what torch computes,
    on the canary and on the test images that can still be read.

    Args:
        run: the run that the bundle was exported from.
        path: the bundle's folder.
        tolerance: another bound on the logit difference than the manifest's.
        min_agreement: another share of equal answers than the manifest's.

    Raises:
        HealthError: the engine differs by more than the bounds.
        InputError: the bundle does not say what the run says.
        NotForThisDevice: the bundle is of another run.
    """
    opened = open_bundle(path)
    manifest, run = opened.manifest, run.encoded(opened.manifest.encoding)
    _require_same(run, opened)
    bounds = precisions.named(manifest.precision)
    inputs = canary.inputs(manifest.canary.seed, run.preprocessing, manifest.canary.count)
    known = manifest.canary.count
    count = PARITY_IMAGES_QUANTISED if bounds.quantised else PARITY_IMAGES
    if len(pixels := _some_pixels(run, manifest.task, count)):
        inputs = joined([inputs, run.preprocessing.arrays(pixels)])
    else:
        what = "no test %s can be read: the exported model is compared on its canary only"
        log.warning(what, run.preprocessing.noun)
    with stage(f"comparing the {manifest.precision} model with torch"):
        logits, reference = engine_logits(opened, inputs), host_logits(run, manifest.task, inputs)
    if canary.largest_difference(opened.canary_logits, reference[:known]) > CANARY_ROUNDING:
        raise InputError(
            f"{path / FACTORS} was changed: its canary is not what {run.path} computes; export "
            "the bundle again"
        )
    allowed = manifest.tolerance if tolerance is None else tolerance
    agreement = manifest.min_agreement if min_agreement is None else min_agreement
    found = compare(logits, reference).require(
        allowed, agreement, bounds.unit, f"the {manifest.precision} model"
    )
    difference = canary.largest_difference(logits[:known], reference[:known])
    if difference > manifest.canary.tolerance:
        raise HealthError(
            f"the {manifest.precision} model fails its canary: {difference:.2g} (allowed "
            f"{manifest.canary.tolerance:g})"
        )
    return found


def _require_same(run: Run, opened: Bundle) -> None:
    """Raises InputError or NotForThisDevice unless manifest and factors say what the run says."""
    path, manifest = opened.path, opened.manifest
    if manifest.lineage != run.lineage or run.state(manifest.task).digest != manifest.state:
        raise NotForThisDevice(
            f"{path} was not exported from {run.path}: name the run it came from with --run"
        )
    for name, value in _facts(run, run.state(manifest.task)).items():
        if _plain(value) != _plain(getattr(manifest, name)):
            raise InputError(
                f"{path / MANIFEST} was changed: its {name} is not that of {run.path}; export the "
                "bundle again"
            )
    if opened.state.classes != run.state(manifest.task).classes:
        raise InputError(
            f"{path / CLASSES} was changed: it does not hold the classes of {run.path}; export the "
            "bundle again"
        )
    stored = load_tensors(path / FACTORS)
    stored.pop(CANARY_LOGITS)
    if tensors_digest(stored) != tensors_digest(_stored(run, run.state(manifest.task))):
        raise InputError(
            f"{path / FACTORS} was changed: it does not hold the factors, temperature and unknown "
            f"score of {run.path}; export the "
            "bundle again"
        )


def _model_of(backbone: str) -> str:
    """What devices learn of a backbone's name: of a folder on this machine its last part alone."""
    return Path(backbone).name if backbone.startswith(("/", ".", "~")) else backbone


def _facts(run: Run, state: TaskState) -> dict[str, Any]:
    """The fields of the manifest that the run alone decides."""
    return {
        "states": state.states,
        "task_name": state.name,
        "model": _model_of(run.config.backbone.backbone),
        "features": run.config.method.features,
        "encoding": run.config.method.encoding,
        "revisions": tuple(run.revision(task) for task in range(1, state.task + 1)),
        "magnitudes": tuple(state.magnitudes.tolist()),
        "preprocessing": run.preprocessing.to_manifest(),
        "projections": run.projections,
    }


def _plain(value: Any) -> bytes:
    """To compare a value with what comes back from JSON."""
    if value and isinstance(value, tuple) and is_dataclass(value[0]):
        value = [asdict(p) for p in value]
    return dump_json({"": value})


def _stored(run: Run, state: TaskState) -> dict[str, np.ndarray]:
    """What FACTORS holds beside the canary: factors of the tasks so far, and the confidence."""
    factors = {
        f"{k}.{n}": np.ascontiguousarray(t)
        for k, f in enumerate(run.factors(state.task), 1)
        for n, t in factor_tensors(f).items()
    }
    return factors | state.confidence.tensors()


def engine_logits(opened: Bundle, inputs: Inputs) -> np.ndarray:
    """What a bundle's engine computes in the bundle's own state.

    Args:
        opened: the bundle.
        inputs: what `Preparation.arrays` makes of N items.

    Returns:
        float32 (N, live classes).
    """
    with tempfile.TemporaryDirectory() as workspace:
        engine = open_engine(opened, 0, Path(workspace))
        loaded = engine.load(
            {
                **opened.weights,
                HEAD_WEIGHT: opened.state.head_weight,
                HEAD_BIAS: opened.state.head_bias,
            }
        )
        found = np.concatenate([engine.run(loaded, part) for part in parts(inputs, BATCH)])
        return found[:, opened.state.live]


def _some_pixels(run: Run, task: int, count: int) -> np.ndarray:
    """Up to `count` test items, spread over the classes: (N, *shape)."""
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

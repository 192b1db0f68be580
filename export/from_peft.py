"""An adapter of the `peft` library, trained elsewhere, as the next task of a run. See `peft`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch

from ..errors import InputError
from ..formats.encoding import Factors, encode
from ..formats.packet import LIMITS
from ..state import Projection, round_magnitudes
from ..storage import atomic
from ..train import plan
from ..train.loop import Report, learn
from ..train.run import Run
from ..train.task import Direction
from .peft import MODEL, PREFIX
from .peft_config import AdapterConfig
from .peft_modules import CLASSIFIERS, classifier_of, module_of

log = logging.getLogger("sdlora_edge")
PICKLE = "adapter_model.bin"
ROUNDING = {"fp32": 0.01, "fp16": 0.01, "int8": 0.05, "int4": 0.3}
"""largest share of an adapter's norm that each encoding may take away"""


def from_peft(
    path: Path,
    run_path: Path,
    data: str,
    name: str | None = None,
    report: Report = lambda run: None,
) -> Run:
    """Make an adapter the next task of a run, and fit the head to images.

    The direction is added to the run's own: W_t = W_{t-1} + scaling B A. Old magnitudes stay.

    Args:
        path: the adapter's folder.
        run_path: the run.
        data: a folder with a folder for each class, or a ZIP.
        name: the task's name. Default: the adapter's.
        report: is called with the run after the task.

    Raises:
        InputError: the adapter cannot be read, or factors of this run cannot represent it.
        UsageError: the run takes no adapter.
    """
    plan.adapter(path, run_path)
    return add(path, plan.one_more(run_path, data, name or path.resolve().name), report)


def add(path: Path, task: plan.NewTask, report: Report = lambda run: None) -> Run:
    """`from_peft`, of a task that was checked. path: the adapter's folder."""
    run = Run.open(task.run)
    direction = _normalised(read_adapter(path, run), run, path)
    return learn(task, report, direction, f"packet from-peft {path}")


def read_adapter(path: Path, run: Run) -> dict[str, Factors]:
    """Read the direction in an adapter's folder.

    Returns:
        Float32 factors by the run's projections, with peft's scaling folded into B.

    Raises:
        InputError: the folder is not a LoRA adapter in safetensors, or holds something that factors
            of these projections cannot represent. The message names it.
    """
    config = AdapterConfig.read(path)
    tensors = _tensors(path)
    heads = tuple(f"{PREFIX}{module}." for module in _heads(path, config, run))
    if aside := {key for key in tensors if key.startswith(heads) and "lora_" not in key}:
        log.info("the adapter's own head is left aside: the run fits its head to the data")
    tensors = {key: tensor for key, tensor in tensors.items() if key not in aside}
    factors: dict[str, Factors] = {}
    for module, pair in _pairs(path, tensors).items():
        own = _adapted(path, module, run)
        if any(p.name in factors for p in own):
            raise InputError(f"{path} adapts {module} twice, by two names: save the adapter again")
        scaled = pair["B"] * config.scaling(module, pair["A"], pair["B"])
        factors |= _sliced(path, own, pair["A"], scaled, run)
    return factors


def _heads(path: Path, config: AdapterConfig, run: Run) -> set[str]:
    """Modules that are a head. Raises InputError if other modules are replaced too."""
    if not config.modules_to_save:
        return set()
    heads = {classifier_of(run.config.backbone.backbone)} if _of_timm(run) else CLASSIFIERS
    if unknown := set(config.modules_to_save) - heads:
        raise InputError(
            f"{path} also replaces whole modules (modules_to_save: {', '.join(sorted(unknown))}): "
            "train it without them"
        )
    return set(config.modules_to_save)


def _of_timm(run: Run) -> bool:
    return run.preprocessing.spatial


def _pairs(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"A": (rank, columns), "B": (rows, rank)}}. Raises InputError for anything else."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not found or tensor.ndim not in (2, 4) or tensor.shape[2:] not in ((), (1, 1)):
            raise InputError(
                f"{path / MODEL} holds {key} {tensor.shape}, which is no factor of a linear layer "
                "or pointwise convolution"
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{path / MODEL}: {key} holds NaN or infinity: train it again")
        pairs.setdefault(found[1], {})[found[2]] = tensor.reshape(tensor.shape[:2])
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise InputError(
                f"{path / MODEL} has lora_{min(pair)} of {module} but not the other factor: save "
                "the adapter again"
            )
    return pairs


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / MODEL
    if not path.is_file() and (folder / PICKLE).exists():
        raise InputError(
            f"{folder / PICKLE} is a pickle, which can run any program when it is read: save the "
            "adapter with safe_serialization=True"
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
    # A model for one purpose holds its encoder as `bert`, `roberta`, ..
    names = {module} if _of_timm(run) else {module, module.partition(".")[2]}
    own = [p for p in run.projections if module_of(p.tensor) in names]
    if not own:
        raise InputError(
            f"{path} adapts {module}, which {run.path} does not: it adapts "
            f"{', '.join(sorted({module_of(p.tensor) for p in run.projections})[:4])}"
            ", ...; "
            "train the adapter on those modules, or begin a run with other --targets"
        )
    return own


def _sliced(
    path: Path, own: Sequence[Projection], A: np.ndarray, B: np.ndarray, run: Run
) -> dict[str, Factors]:
    """One module's factors, cut into those of its projections.

    Each projection gets its rows of B, and the ranks that count there.
    """
    module = module_of(own[0].tensor)
    shape = run.base_weights[own[0].tensor].shape
    if (len(B), A.shape[1]) != shape:
        raise InputError(
            f"{path}: {module} has factors {A.shape} and {B.shape} for a weight of {shape}: it is "
            "of another backbone; train it on the run's own"
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
            f"{path} changes rows {first} to {last} of {module}.weight too, of which {run.path} "
            f"adapts only {', '.join(f'{p.start} to {p.stop - 1} ({p.name})' for p in own)}: begin "
            "a run with --targets that take the whole of it"
        )
    return found


def _normalised(factors: Mapping[str, Factors], run: Run, path: Path) -> Direction:
    """The direction as the run's own ones are: float32, of norm 1 (root mean square over
    projections). The norm becomes alpha_t. Raises InputError."""
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
            f"{path} changes nothing: all its factors B are zero; train it, then add it again"
        )
    if norm.max() > LIMITS.magnitude:
        raise InputError(
            f"{path} has norm {norm.max():.3g}, but a magnitude is at most {LIMITS.magnitude:g}: "
            "train it with smaller weights"
        )
    found = _encoded(factors, dict(zip((p.name for p in run.projections), norm)), run, path)
    deltas = np.zeros((len(run.states), *norm.shape) if wide else len(run.states))
    deltas[-1] = round_magnitudes(norm if wide else norm[0])
    return found, deltas


def _encoded(
    factors: Mapping[str, Factors], norms: Mapping[str, float], run: Run, path: Path
) -> dict[str, Factors]:
    """The factors over their norms. Raises InputError if the run's encoding loses too much."""
    found, error, total, encoding = dict[str, Factors](), 0.0, 0.0, run.config.method.encoding
    for name, norm in norms.items():
        if (f := factors.get(name)) is None:
            continue
        try:
            with np.errstate(over="ignore"):  # encode refuses what this makes infinite
                found[name] = encode(Factors(f.A, f.B / np.float32(norm)), "fp32")
            shipped = encode(found[name], encoding)
        except ValueError as wrong:
            raise InputError(f"{path}: {name}: {wrong}") from wrong
        exact = _product(f)
        error += float(np.square(norm * _product(shipped) - exact).sum())
        total += float(np.square(exact).sum())
    if error > ROUNDING[encoding] ** 2 * total:
        raise InputError(
            f"{path} loses {100 * np.sqrt(error / total):.0f} % in {encoding}: its A and B are of "
            "too different sizes; begin a run with another --encoding"
        )
    return found


def _product(f: Factors) -> np.ndarray:
    return f.B.astype(np.float64) @ f.A.astype(np.float64)

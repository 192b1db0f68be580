"""One task's training: minimise the cross-entropy over its own classes, resumable at every epoch, on one process or several."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..errors import DivergedError, UsageError
from ..inputs.image import Preprocessing
from ..method.sdlora import SDLoRA
from ..storage import atomic
from . import distributed
from .augment import augment, draw
from .settings import Settings
from .splits import Images

log = logging.getLogger("sdlora_edge")
PARTIAL = "partial.pt"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **more: torch.optim.SGD(groups, momentum=0.9, **more),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Checkpoint:
    """The epoch a training is in: trained numbers, optimizer, random states; nothing of an image. One file, made anew each epoch.

    key: what the training is of. A file left by another training is not taken.
    """

    def __init__(self, run: Path, *key: object) -> None:
        self.path, self.key = run / PARTIAL, hashlib.sha256(repr(key).encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        try:
            found = torch.load(
                io.BytesIO(atomic.read(self.path)), map_location="cpu", weights_only=True
            )
        except Exception as error:  # torch raises many kinds on a damaged file
            log.warning("%s cannot be read (%r): its task begins anew", self.path, error)
            return None
        return found if found.get("key") == self.key else None

    def save(self, value: dict[str, Any]) -> None:
        if distributed.first():
            buffer = io.BytesIO()
            torch.save(value | {"key": self.key}, buffer)
            atomic.write(self.path, buffer.getvalue())

    def clear(self) -> None:
        if distributed.first():
            self.path.unlink(missing_ok=True)


def fit(
    model: SDLoRA,
    images: Images,
    settings: Settings,
    prepare: Preprocessing,
    task: int,
    checkpoint: Checkpoint,
    note: Callable[[str, float, int], None] = lambda name, value, step: None,
) -> None:
    """Train a model in place for `settings.training.epochs`. The backbone stays in eval mode: it is frozen.

    note: called with (name, value, step) of what a log may want. Raises DivergedError if the loss or a trained number is no longer finite.
    """
    device = next(model.parameters()).device
    optimizer = _optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.training.precision == "fp16")
    order = torch.Generator().manual_seed(settings.training.seed)
    parts: dict[str, Any] = {"optimizer": optimizer, "scaler": scaler}
    begin = _restore(checkpoint, model, parts, order)
    call = _wrapped(model, settings, device)
    title = f"task {task}"
    with tqdm(
        total=settings.training.epochs * len(images),
        initial=begin * len(images),
        desc=title,
        unit="image",
        disable=None,
    ) as bar:
        for epoch in range(begin, settings.training.epochs):
            batches = torch.randperm(len(images), generator=order).tensor_split(
                math.ceil(len(images) / settings.training.batch_size)
            )
            chances = [draw(len(batch), settings.data.augment, order) for batch in batches]
            shares = [distributed.share(len(batch)) for batch in batches]
            own = [batch[share] for batch, share in zip(batches, shares, strict=True)]
            total = torch.zeros((), device=device)
            for step, pixels in enumerate(
                images.batches([part.numpy() for part in own], settings.training.workers)
            ):
                inputs = augment(
                    torch.from_numpy(prepare.normalise(pixels)),
                    chances[step][shares[step]],
                    settings.data.augment,
                )
                targets = torch.from_numpy(images.targets)[own[step]]
                optimizer.zero_grad()
                loss = _backward(
                    model, call, scaler, inputs, targets, len(batches[step]), settings, device
                )
                scaler.step(optimizer)
                scaler.update()
                total += loss
                bar.update(len(batches[step]))
            mean = distributed.summed(total).item() / len(batches)
            if not math.isfinite(mean):
                raise diverged(title, f"the loss of epoch {epoch + 1} is not finite", settings)
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            note(f"loss/{title}", mean, epoch + 1)
            trained = {
                name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad
            }
            if not all(
                p.isfinite().all() for p in trained.values()
            ):  # the last step comes after its loss
                raise diverged(
                    title, f"a number learned in epoch {epoch + 1} is not finite", settings
                )
            states = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(
                {
                    "epoch": epoch + 1,
                    "model": trained,
                    "order": order.get_state(),
                    "random": torch.get_rng_state(),
                    **states,
                }
            )


def diverged(title: str, what: str, settings: Settings) -> DivergedError:
    return DivergedError(
        f"{title} diverged: {what}. Begin a run with a smaller --lr than {settings.training.lr:g}; this run keeps its earlier tasks"
    )


def _backward(
    model: SDLoRA,
    call: nn.Module,
    scaler: torch.amp.GradScaler,
    inputs: Tensor,
    targets: Tensor,
    batch: int,
    settings: Settings,
    device: torch.device,
) -> Tensor:
    """Gradients of this process's share of one step, in `accumulate` parts; returns its share of the loss, detached.

    batch: images of the step over all processes; more than `inputs` there. Gradients are averaged over processes, hence the
    factor.
    """
    total = torch.zeros((), device=device)
    chunks = [c for c in torch.arange(len(targets)).chunk(settings.training.accumulate) if len(c)]
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        synchronised = (
            contextlib.nullcontext()
            if last or not isinstance(call, DistributedDataParallel)
            else call.no_sync()
        )
        with synchronised:
            with precision(model.backbone, settings.training.precision, device):
                logits = call(_to(inputs[chunk], device))
            loss = (
                nn.functional.cross_entropy(logits, _to(targets[chunk], device), reduction="sum")
                / batch
            )
            scaler.scale(loss * distributed.size()).backward()
            total += loss.detach()
    return total


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _optimizer(model: SDLoRA, settings: Settings) -> torch.optim.Optimizer:
    lr = settings.training.lr
    groups = [
        {
            "params": [p for p in (*model.A, *model.B) if p.requires_grad],
            "weight_decay": settings.training.weight_decay,
        },
        {
            "params": [p for p in [model.magnitudes] if p.requires_grad],
            "lr": lr * settings.training.magnitude_lr_factor,
        },
        {"params": list(model.head.parameters()), "lr": lr * settings.training.head_lr_factor},
    ]
    return _OPTIMIZERS[settings.training.optimizer](
        [{"weight_decay": 0.0, **g} for g in groups if g["params"]], lr=lr
    )


def _restore(
    checkpoint: Checkpoint, model: SDLoRA, parts: dict[str, Any], order: torch.Generator
) -> int:
    """Take up a training where its checkpoint stands; returns the epochs that are done."""
    found = checkpoint.load()
    if found is None:
        return 0
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in found["model"].items():
            parameters[name].copy_(value)
    for name, part in parts.items():
        part.load_state_dict(found[name])
    order.set_state(found["order"])
    torch.set_rng_state(found["random"])
    log.info("going on at epoch %d", found["epoch"] + 1)
    return int(found["epoch"])


def _wrapped(model: SDLoRA, settings: Settings, device: torch.device) -> nn.Module:
    """The model as it is called: compiled, and spread over processes, where that is asked for."""
    call: nn.Module = model
    if settings.training.compile:
        call = torch.compile(call)  # type: ignore[assignment]
    if distributed.size() > 1:
        call = DistributedDataParallel(call, device_ids=[device] if device.type == "cuda" else None)
    return call


@contextlib.contextmanager
def precision(backbone: nn.Module, name: str, device: torch.device) -> Iterator[None]:
    """Compute in the precision of that name, by autocast.

    On a CPU in half precision torch's fused attention takes half of a ViT-Tiny's step (96 px: 160 against 330 images a second
    without it, one core), so it is left out there.
    """
    fused = [m for m in backbone.modules() if getattr(m, "fused_attn", False)]
    slow = device.type == "cpu" and name in _HALF
    for module in fused if slow else []:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        with torch.autocast(device.type, _HALF.get(name), enabled=name in _HALF):
            yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def writer(run: Path, settings: Settings) -> Callable[[str, float, int], None]:
    """Where losses and scores go: TensorBoard event files in the run, if asked for. Raises UsageError without tensorboard."""
    if not (settings.training.tensorboard and distributed.first()):
        return lambda name, value, step: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from error
    events = SummaryWriter(str(run / "events"))

    def note(name: str, value: float, step: int) -> None:
        events.add_scalar(name, value, step)
        events.flush()

    return note

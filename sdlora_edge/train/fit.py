"""Training one task: minimise the cross-entropy over its own classes.

It resumes at any epoch, on one process or several.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..errors import DivergedError, UsageError
from ..inputs.modality import Preparation
from ..method.sdlora import SDLoRA
from ..storage import atomic
from . import distributed
from .augment import augment, draw
from .kinds import modality
from .settings import Settings
from .splits import Images
from .turns import TURNS, draw_turns, rows_for_turns, turn
from .upload import to_device

log = logging.getLogger("sdlora_edge")
PARTIAL = "partial.pt"
Note = Callable[[str, float, int], None]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **more: torch.optim.SGD(groups, momentum=0.9, **more),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Checkpoint:
    """The last finished epoch of a training: trained numbers, optimizer, random states, losses.

    It holds nothing of an image. It is one file, replaced after each epoch. key: what identifies
    the training. The file of another training is not used.
    """

    def __init__(self, run: Path, *key: object) -> None:
        self.path, self.key = run / PARTIAL, hashlib.sha256(repr(key).encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """What was saved; None if there is nothing of this training."""
        if not self.path.is_file():
            return None
        try:
            found = torch.load(
                io.BytesIO(atomic.read(self.path)), map_location="cpu", weights_only=True
            )
        except Exception as error:  # torch raises many kinds on a damaged file
            log.warning("%s cannot be read (%r): its task begins again", self.path, error)
            return None
        return found if found.get("key") == self.key else None

    def save(self, value: dict[str, Any]) -> None:
        """Replace the file; of torchrun's processes the first one does."""
        if distributed.first():
            buffer = io.BytesIO()
            torch.save(value | {"key": self.key}, buffer)
            atomic.write(self.path, buffer.getvalue())

    def clear(self) -> None:
        """Remove the file: the training is over."""
        if distributed.first():
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Training:
    """How a task is trained.

    task: its number. note: takes (name, value, step) of what a log may want.
    """

    settings: Settings
    prepare: Preparation
    task: int
    checkpoint: Checkpoint
    note: Note = lambda name, value, step: None

    @property
    def title(self) -> str:
        """The task's name in messages."""
        return f"task {self.task}"


def steps_of(settings: Settings, images: int, task: int) -> tuple[int, int]:
    """(epochs, steps in an epoch) of a task with a number of images.

    Few images make few steps, and a direction of a few steps is hardly learned: 15 epochs instead
    of 5 were worth 6 points on a dataset with two or three steps an epoch.
    """
    steps = math.ceil(images / settings.training.batch_size)
    first = task == 1 and not settings.data.base_classes
    times = settings.training.first_task if first else 1.0
    epochs = max(settings.training.epochs, settings.training.min_steps / steps)
    return math.ceil(times * epochs), steps


def fit(model: SDLoRA, images: Images, training: Training) -> list[float]:
    """Train a model in place for the settings' number of epochs, or of steps if that is more.

    The backbone stays in eval mode: it is frozen. Returns the mean loss of each epoch, of those
    before a restart too. Raises DivergedError if the loss or a trained number is no longer finite.
    """
    turned = training.settings.training.turned if model.rank and training.prepare.spatial else 0.0
    with rows_for_turns(model) if turned else contextlib.nullcontext():
        return _Fitting(model, images, training, turned).run()


@dataclass(frozen=True, eq=False)
class _Share:
    """What one process trains on in a step.

    pixels: items (n, *shape). chances: of `draw`, (n, 5). targets: int64 (n,).
    """

    pixels: Tensor
    chances: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> _Share:
        tensors = self.pixels, self.chances, self.targets
        return _Share(*(to_device(tensor, device) for tensor in tensors))

    def parts(self, count: int) -> list[_Share]:
        """Cut it into `count` parts, or fewer if there are fewer images."""
        cut = (t.chunk(count) for t in (self.pixels, self.chances, self.targets))
        return [_Share(*tensors) for tensors in zip(*cut, strict=True)]


class _Fitting:
    """A training in progress: the model and everything that its checkpoint holds.

    turned: share of images that are turned (`turns`).
    """

    def __init__(
        self, model: SDLoRA, images: Images, training: Training, turned: float = 0.0
    ) -> None:
        settings, self.turned = training.settings, turned
        self.model, self.images, self.training, self.settings = model, images, training, settings
        self.device = next(model.parameters()).device
        self.upload = modality(training.prepare.kind).upload(training.prepare, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=settings.training.precision == "fp16"
        )
        self.optimizer = _optimizer(model, settings)
        self.order = torch.Generator().manual_seed(settings.training.seed)
        self.losses: list[float] = []
        self.classes = len(model.head.weight) // (TURNS if turned else 1)
        self._restore()
        self.call = _wrapped(model, settings, self.device)

    def run(self) -> list[float]:
        images, title = len(self.images), self.training.title
        noun = self.training.prepare.noun
        epochs, _ = steps_of(self.settings, images, self.training.task)
        done = len(self.losses)
        total = epochs * images
        # Without a terminal tqdm shows nothing, so each epoch logs one line.
        with tqdm(total=total, initial=done * images, desc=title, unit=noun, disable=None) as bar:
            for epoch in range(done + 1, epochs + 1):
                begin = time.perf_counter()
                loss = self._epoch(bar)
                self._require_finite(epoch, loss)
                self.losses.append(loss)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if bar.disable and distributed.first():
                    speed = images / (time.perf_counter() - begin)
                    line = "%s, epoch %d of %d: loss %.3f, %.0f %ss/s"
                    log.info(line, title, epoch, epochs, loss, speed, noun)
                self.training.note(f"loss/{title}", loss, epoch)
                self._save(epoch)
        return self.losses

    def _epoch(self, bar: tqdm[Any]) -> float:
        """One pass over the images. Returns the mean loss of its steps, over all processes."""
        settings, images = self.settings, self.images
        _, steps = steps_of(settings, len(images), self.training.task)
        batches = torch.randperm(len(images), generator=self.order).tensor_split(steps)
        # Chances are drawn for whole batches, so a seed gives the same views on any number of
        # processes.
        chances = [draw(len(batch), settings.data.augment, self.order) for batch in batches]
        quarters = [draw_turns(len(batch), self.turned, self.order) for batch in batches]
        shares = [distributed.share(len(batch)) for batch in batches]
        own = [batch[share] for batch, share in zip(batches, shares, strict=True)]
        total = torch.zeros((), device=self.device)
        decoded = images.batches([part.numpy() for part in own], settings.training.workers)
        for step, shown in enumerate(decoded):
            targets = torch.from_numpy(images.targets)[own[step]]
            quarter = quarters[step][shares[step]]
            pixels, targets = turn(shown, targets, quarter, self.classes)
            given = torch.from_numpy(pixels), chances[step][shares[step]], targets
            self.optimizer.zero_grad()
            total += self._backward(_Share(*given), len(batches[step]))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            bar.update(len(batches[step]))
        return distributed.summed(total).item() / len(batches)

    def _backward(self, share: _Share, batch: int) -> Tensor:
        """Compute the gradients of this process's share of one step, in `accumulate` parts.

        batch: images of the step over all processes. Returns this process's share of the loss,
        detached.
        """
        total = torch.zeros((), device=self.device)
        parts = share.to(self.device).parts(self.settings.training.accumulate)
        for part in parts:
            inputs = self.upload.arrays(part.pixels)
            if self.training.prepare.spatial:
                (pictures,) = inputs
                inputs = (augment(pictures, part.chances, self.settings.data.augment),)
            with self._synchronised(part is parts[-1]):
                with precision(self.model.backbone, self.settings.training.precision, self.device):
                    logits = self.call(*inputs)
                loss = nn.functional.cross_entropy(logits, part.targets, reduction="sum") / batch
                # DistributedDataParallel averages gradients over processes; the sum is wanted.
                self.scaler.scale(loss * distributed.size()).backward()
            total += loss.detach()
        return total

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Several processes exchange gradients at the last part of a step only."""
        if last or not isinstance(self.call, DistributedDataParallel):
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self.call.no_sync()
        return no_sync

    def _require_finite(self, epoch: int, loss: float) -> None:
        what = ""
        if not math.isfinite(loss):
            what = f"the loss of epoch {epoch} is not finite"
        # The last step of an epoch comes after its loss, so the numbers themselves are checked too.
        elif not all(value.isfinite().all() for value in self._trained().values()):
            what = f"a number learned in epoch {epoch} is not finite"
        if what:
            raise diverged(self.training.title, what, self.settings)

    def _trained(self) -> dict[str, Tensor]:
        parameters = self.model.named_parameters()
        return {name: p.detach().cpu() for name, p in parameters if p.requires_grad}

    def _save(self, epoch: int) -> None:
        self.training.checkpoint.save(
            {
                "epoch": epoch,
                "losses": self.losses,
                "model": self._trained(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "order": self.order.get_state(),
                "random": torch.get_rng_state(),
            }
        )

    def _restore(self) -> None:
        """Go on where the checkpoint stands, if there is one."""
        found = self.training.checkpoint.load()
        if found is None:
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in found["model"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.order.set_state(found["order"])
        torch.set_rng_state(found["random"])
        self.losses = list(found["losses"])
        log.info("%s goes on at epoch %d", self.training.title, found["epoch"] + 1)


def diverged(title: str, what: str, settings: Settings) -> DivergedError:
    """The error of a training whose numbers are no longer finite, or too large."""
    return DivergedError(
        f"{title} diverged: {what}. Begin a run with a smaller --lr than {settings.training.lr:g}; "
        "this run keeps its earlier tasks"
    )


def _optimizer(model: SDLoRA, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer, with a rate for each of three groups: new direction, magnitudes, head.

    The new direction alone has weight decay.
    """
    factors = [p for p in (*model.A, *model.B) if p.requires_grad]
    magnitudes = [p for p in [model.magnitudes] if p.requires_grad]
    lr = settings.training.lr
    groups: list[dict[str, Any]] = [
        {"params": factors, "weight_decay": settings.training.weight_decay},
        {"params": magnitudes, "lr": lr * settings.training.magnitude_lr_factor},
        {"params": list(model.head.parameters()), "lr": lr * settings.training.head_lr_factor},
    ]
    return _OPTIMIZERS[settings.training.optimizer](
        [{"weight_decay": 0.0, **g} for g in groups if g["params"]], lr=lr
    )


def _wrapped(model: SDLoRA, settings: Settings, device: torch.device) -> nn.Module:
    """The model as it is called: compiled, and spread over processes, if that is asked for."""
    call: nn.Module = model
    if settings.training.compile:
        call = torch.compile(call)  # type: ignore[assignment]
    if distributed.size() > 1:
        call = DistributedDataParallel(call, device_ids=[device] if device.type == "cuda" else None)
    return call


@contextlib.contextmanager
def precision(backbone: nn.Module, name: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision, by autocast. name: fp32, bf16 or fp16.

    On a CPU in half precision torch's fused attention is switched off: it takes half of a
    ViT-Tiny's step (96 px, one core: 160 images a second with it, 330 without).
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


def writer(run: Path, settings: Settings) -> Note:
    """Writes losses and scores to TensorBoard event files in the run, if that is asked for.

    Raises UsageError if tensorboard is not installed.
    """
    if not (settings.training.tensorboard and distributed.first()):
        return lambda name, value, step: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard, which is not installed: "
            "run `pip install tensorboard`"
        ) from error
    events = SummaryWriter(str(run / "events"))

    def note(name: str, value: float, step: int) -> None:
        events.add_scalar(name, value, step)
        events.flush()

    return note

"""A whole epoch from image files, ours beside a plain timm fine-tuning loop: images a second.

The plain loop is what people write: timm's model with `peft`'s LoRA of the same rank on qkv, all
else frozen but a new head; torchvision's transforms in a DataLoader. Files, batch size, precision,
threads and preprocessing are the same. Ours is `splits.read` and `fit.fit`, as `train` calls them.

Ours decodes the images of a task once, the plain loop in every epoch. So an epoch of ours is one
of a task of EPOCHS epochs: it bears its share of the decoding. `first_epoch_over_timm` is the worst
case, a task of one epoch. Both sides run in turn, and a ratio is the median over rounds of the
ratio within a round. The weights are random: they change no time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from sdlora_edge.formats.confidence import Confidence
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.method import backbones
from sdlora_edge.method.sdlora import Past, SDLoRA, Variant, zero_head
from sdlora_edge.state import TaskState
from sdlora_edge.train import splits
from sdlora_edge.train.fit import Checkpoint, Training, fit
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.source import SeedSplit

RANK, CLASSES, EPOCHS = 10, 10, 5
"""EPOCHS: of a task, over which ours spreads its decoding"""
MEAN, STD = (0.5,) * 3, (0.5,) * 3
TIMM = {"vit_tiny": "vit_tiny_patch16_224", "vit_base": "vit_base_patch16_224"}


@dataclass(frozen=True)
class Case:
    """What both sides do.

    side: of the model's input, in pixels. images: in an epoch. workers: processes that decode.
    """

    model: str
    side: int
    batch: int
    images: int
    device: str
    precision: str
    workers: int = 2
    compiled: bool = False


def cases(options: argparse.Namespace) -> list[Case]:
    """ViT-Tiny at both sizes; with CUDA ViT-B/16 at 224 px too, compiled and not."""
    given = options.device, options.precision
    if options.device == "cpu":
        sizes = ((96, 64, 512), (224, 32, 128))
        found = [Case("vit_tiny", side, batch, images, *given) for side, batch, images in sizes]
    else:
        tiny = [Case("vit_tiny", side, 64, 2048, *given, workers=8) for side in (96, 224)]
        base = Case("vit_base", 224, 64, 1024, options.device, "bf16", workers=8)
        found = [*tiny, base, replace(base, compiled=True)]
    limit = options.epoch_images
    return [replace(case, images=min(case.images, limit or case.images)) for case in found]


def image_files(folder: Path, case: Case) -> Path:
    """Write JPEG files of smooth noise, a folder for each class, a third larger than the input."""
    random, side = np.random.default_rng(0), case.side * 4 // 3
    for i in range(case.images):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3)).astype(np.uint8))
        path = folder / f"class {i % CLASSES}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def backbone_of(case: Case) -> nn.Module:
    """timm's model with random weights and without a head."""
    torch.manual_seed(0)
    size = {"img_size": case.side, "num_classes": 0}
    return timm.create_model(TIMM[case.model], **size).eval().requires_grad_(False)


@dataclass(frozen=True)
class Epoch:
    """Seconds, and on CUDA MB of memory above the models that were loaded before.

    decoding: of what is done once a task; it is part of no later epoch.
    """

    decoding: float
    training: float
    memory: float

    @property
    def of_a_task(self) -> float:
        return self.training + self.decoding / EPOCHS


def ours(folder: Path, case: Case) -> Callable[[], Epoch]:
    """What runs an epoch of ours."""
    prepare = Preprocessing(case.side, case.side, "bicubic", MEAN, STD)
    settings = Settings().changed(
        batch_size=case.batch,
        precision=case.precision,
        epochs=1,
        min_steps=0,
        first_task=1.0,
        workers=case.workers,
        compile=case.compiled,
    )
    backbone = backbone_of(case)
    width = backbones.features(backbone)
    start = TaskState(0, "base", "", (), np.zeros(0), *zero_head(0, width), {}, Confidence.none(0))
    past = Past.of(backbones.projections(backbone), [start])
    source = splits.load(str(folder), SeedSplit(0.5, 0))
    chosen = {c: [*source.train[c], *source.test[c]] for c in source.classes}
    scratch = folder.parent / "ours"
    scratch.mkdir(exist_ok=True)

    def epoch() -> Epoch:
        model = SDLoRA(backbone, past, zero_head(CLASSES, width), Variant(RANK)).to(case.device)
        loaded = _loaded(case)
        begin = time.perf_counter()
        images = splits.read(chosen, source.classes, prepare, settings.training.cache_gb)
        decoded = time.perf_counter()
        fit(model, images, Training(settings, prepare, 1, Checkpoint(scratch, "epoch")))
        Checkpoint(scratch).clear()  # the next epoch begins anew
        return Epoch(decoded - begin, _now(case) - decoded, _peak(case, loaded))

    return epoch


def plain(folder: Path, case: Case) -> Callable[[], Epoch]:
    """What runs an epoch of the plain loop."""
    steps = [transforms.Resize(case.side, transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.CenterCrop(case.side), transforms.ToTensor()]
    dataset = datasets.ImageFolder(
        str(folder), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    )
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"])
    backbone = backbone_of(case)
    head = nn.Linear(backbones.features(backbone), CLASSES)
    model: nn.Module = nn.Sequential(get_peft_model(backbone, lora), head).to(case.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    call = torch.compile(model) if case.compiled else model

    loader = DataLoader(
        dataset,
        case.batch,
        shuffle=True,
        num_workers=case.workers,
        pin_memory=case.device == "cuda",
        persistent_workers=case.workers > 0,
    )

    def epoch() -> Epoch:
        loaded = _loaded(case)
        begin = time.perf_counter()
        for images, targets in loader:
            images = images.to(case.device, non_blocking=True)
            targets = targets.to(case.device, non_blocking=True)
            with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
                loss = nn.functional.cross_entropy(call(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Epoch(0.0, _now(case) - begin, _peak(case, loaded))

    return epoch


def _now(case: Case) -> float:
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _loaded(case: Case) -> int:
    """Bytes on the device now. The peak is counted from here on."""
    if case.device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(case: Case, loaded: int) -> float:
    if case.device != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() - loaded) / 1e6


def rounds_of(case: Case, rounds: int) -> Iterator[dict[str, Epoch]]:
    """An epoch of each side for every round, after one that does not count; who begins alternates."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = image_files(Path(scratch) / "images", case)
        sides = {"ours": ours(folder, case), "timm": plain(folder, case)}
        for epoch in sides.values():
            epoch()
        for turn in range(rounds):
            names = list(sides)[:: -1 if turn % 2 else 1]
            row = {name: sides[name]() for name in names}
            seconds = {name: f"{row[name].of_a_task:.2f} s" for name in sides}
            print(case.model, case.side, seconds, file=sys.stderr, flush=True)
            yield row


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Images a second of both sides, and their ratios."""
    rows = list(rounds_of(case, rounds))

    def over_timm(of: Callable[[Epoch], float]) -> float:
        return round(median(row["timm"].training / of(row["ours"]) for row in rows), 4)

    found: dict[str, Any] = {
        "batch": case.batch,
        "images": case.images,
        "precision": case.precision,
        "workers": case.workers,
        "over_timm": over_timm(lambda own: own.of_a_task),
        "first_epoch_over_timm": over_timm(lambda own: own.training + own.decoding),
    }
    for name in ("ours", "timm"):
        speed = case.images / median(row[name].of_a_task for row in rows)
        found[f"{name}_images_per_second"] = round(speed, 1)
        if case.device == "cuda":
            found[f"{name}_memory_mb"] = round(max(row[name].memory for row in rows), 1)
    return found


def figures_of(options: argparse.Namespace) -> dict[str, Any]:
    """What step_cost.json says of epochs: `epoch`, and `epoch_over_timm` by model and size."""
    epochs: dict[str, dict[str, Any]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for case in cases(options):
        name = f"{case.model}_compiled" if case.compiled else case.model
        found = measure(case, options.epoch_rounds)
        epochs.setdefault(name, {})[str(case.side)] = found
        ratios.setdefault(name, {})[str(case.side)] = found["over_timm"]
    return {"epoch": epochs, "epoch_over_timm": ratios}

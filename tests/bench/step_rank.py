"""What the rank of the change of known head rows costs, in accuracy and in bytes.

The heads that a run ships are computed again with several ranks, and scored on its test images: `python tests/bench/step_rank.py RUN`.
If RUN does not exist, it is trained: a part of CIFAR-100 becomes five domains, each with 14 training and 6 test images of each of the
100 classes: as it is, grey, dark, blurred, and in yellow light. So each task brings new images of 100 known classes.
SDLORA_EDGE_DATA says where images and weights lie.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import method
import numpy as np
from method_heads import _read, _right
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sdlora_edge.formats.head_update import RANK, HeadUpdate, Step
from sdlora_edge.method.sdlora import Head
from sdlora_edge.train import loop
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.run import Run
from sdlora_edge.train.score import test_images
from sdlora_edge.train.settings import Settings
from sdlora_edge.train.shipped import step_for
from sdlora_edge.train.tasks import Kept, read_kept

IMAGES = 20
"""of each class in each domain"""
YELLOW = (1.25, 0.95, 0.55)
DOMAINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a_day": lambda image: image,
    "b_grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "c_night": lambda image: ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(0.35)).enhance(0.6),
    "d_soft": lambda image: image.filter(ImageFilter.GaussianBlur(1.0)),
    "e_lamp": lambda image: Image.merge("RGB", [c.point(lambda v, by=by: min(255, int(v * by))) for c, by in zip(image.split(), YELLOW, strict=True)]),
}  # fmt: skip
RANKS = (4, 8, 16, 32, 64)


def write_stream(path: Path) -> None:
    """The training images of `cifar100_sub.zip` as <domain>/<class>/, no image in two domains."""
    with (
        zipfile.ZipFile(method.SHARED / "cifar100_sub.zip") as source,
        zipfile.ZipFile(path, "w") as target,
    ):
        by_class: dict[str, list[str]] = {}
        for name in source.namelist():
            if name.endswith(".png") and "/train/" in name:
                by_class.setdefault(name.split("/")[2], []).append(name)
        for label, names in by_class.items():
            names = [str(name) for name in np.random.default_rng(0).permutation(sorted(names))]
            for k, (domain, change) in enumerate(DOMAINS.items()):
                for i, name in enumerate(names[k * IMAGES : (k + 1) * IMAGES]):
                    shown, found = (
                        Image.open(io.BytesIO(source.read(name))).convert("RGB"),
                        io.BytesIO(),
                    )
                    change(shown).save(found, "PNG")
                    target.writestr(f"{domain}/{label}/{i:02d}.png", found.getvalue())


def train(path: Path) -> None:
    data = path.with_name(f"{path.name}.zip")
    data.parent.mkdir(parents=True, exist_ok=True)
    write_stream(data)
    weights = str(method.SHARED / "vit_tiny_patch16_224.fp16.safetensors")
    asked = {"data": str(data), "weights": weights, "protocol": "domain", "tasks": 5, "epochs": 3}
    loop.train(Settings.of(**method.COMMON, **asked), path)


def main(path: Path) -> None:
    if not path.exists():
        train(path)
    run, tasks = Run.open(path), []
    images = test_images(run, len(run.metrics))
    test = [_read(run, images[entry["task"]], entry["classes"]) for entry in run.metrics]
    targets = [read.targets for read in test]
    for entry in run.metrics:
        evaluator = Evaluator.at(run, task := entry["task"])
        seen = [evaluator.features(read) for read in test[:task]]
        fresh = len(set(entry["classes"]) & set(run.states[task - 1].names))
        tasks.append((read_kept(path, task), fresh, partial(_right, seen, targets[:task])))
    _show("exact rows", [right(_target(kept)) for kept, _, right in tasks])
    for name, step in [
        *((f"rank {rank}", partial(_alone, rank)) for rank in RANKS),
        ("default", _default),
    ]:
        weight, bias = run.states[0].head_weight[:0], run.states[0].head_bias[:0]
        accuracy, ranks = [], []
        for kept, fresh, right in tasks:
            update = HeadUpdate.between((weight, bias), _target(kept), step=step(kept, fresh))
            weight, bias = update.applied(weight, bias)
            accuracy.append(right((weight, bias)))
            ranks.append(len(update.right))
        _show(f"{name}, {ranks[1:]}, the last one in {update.known_bytes:,} bytes", accuracy)


def _show(name: str, accuracy: list[float]) -> None:
    print(
        f"{name}: average anytime {np.mean(accuracy):.1f} %, last {accuracy[-1]:.1f} %", flush=True
    )


def _target(kept: Kept) -> Head:
    assert kept.aligned is not None
    return kept.aligned.discriminant()


def _default(kept: Kept, fresh: int, rank: int = RANK) -> Step:
    head = _target(kept)
    return step_for(kept, head, range(len(head[0])), rank, fresh)


def _alone(rank: int, kept: Kept, fresh: int) -> Step:
    return _default(kept, 0, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

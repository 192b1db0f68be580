"""New images of many known classes: what the rank of the change of known head rows costs, in accuracy and in bytes.

A part of CIFAR-100 becomes five domains, each with 14 training and 6 test images of each of the 100 classes: as it is, grey, dark,
blurred, and in yellow light. The default learns one after the other. Then the heads that it ships are computed again with other ranks.
`python tests/bench/known_classes.py FOLDER` keeps stream and training in FOLDER. SDLORA_EDGE_DATA says where images and weights lie.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import method
import numpy as np
from method_heads import _read, _right
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sdlora_edge.formats.head_update import HeadUpdate, Step
from sdlora_edge.method.head import FeatureStatistics
from sdlora_edge.train import loop, splits
from sdlora_edge.train.evaluator import Evaluator
from sdlora_edge.train.run import Run
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


def trained(folder: Path) -> Run:
    data, path = folder / "stream.zip", folder / "run"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_stream(data)
        weights = str(method.SHARED / "vit_tiny_patch16_224.fp16.safetensors")
        asked = {**method.COMMON, "data": str(data), "weights": weights, "protocol": "domain", "tasks": 5, "epochs": 3}  # fmt: skip
        return loop.train(Settings.of(**asked), path)
    return loop.resume(path)


def main(folder: Path) -> None:
    run = trained(folder)
    parts = splits.parts(splits.load_for(run.config, run.config.data.data), run.config)
    test = [_read(run, part.test, part.classes) for part in parts]
    seen, kept = [], [read_kept(run.path, task) for task in range(1, len(run.states))]
    for task in range(1, len(run.states)):
        evaluator = Evaluator.at(run, task)
        seen.append([evaluator.features(images) for images in test[:task]])
    targets = [images.targets for images in test]
    exact = [_right(f, targets[: len(f)], _statistics(k).discriminant()) for f, k in zip(seen, kept, strict=True)]  # fmt: skip
    print(f"exact rows: average anytime {np.mean(exact):.1f} %, last {exact[-1]:.1f} %")

    def alone(rank: int) -> Callable[[Kept, int], Step]:
        return lambda k, _: Step(rank, _statistics(k).around(range(100)), _statistics(k).means.mean(axis=0))  # fmt: skip

    def default(k: Kept, known: int) -> Step:
        return step_for(k, _statistics(k).discriminant(), range(100), 8, known)

    for name, step in [*((f"rank {rank}", alone(rank)) for rank in RANKS), ("default", default)]:
        width = seen[0][0].shape[1]
        head, accuracy, ranks = (np.zeros((0, width), np.float32), np.zeros(0, np.float32)), [], []
        for f, k in zip(seen, kept, strict=True):
            update = HeadUpdate.between(head, _statistics(k).discriminant(), step=step(k, len(head[0])))  # fmt: skip
            head = update.applied(*head)
            accuracy.append(_right(f, targets[: len(f)], head))
            ranks.append(len(update.right))
        print(f"{name}: average anytime {np.mean(accuracy):.1f} %, last {accuracy[-1]:.1f} %, ranks {ranks[1:]}, the last one in {update.known_bytes:,} bytes")  # fmt: skip


def _statistics(kept: Kept) -> FeatureStatistics:
    assert kept.aligned is not None
    return kept.aligned


if __name__ == "__main__":
    main(Path(sys.argv[1]))

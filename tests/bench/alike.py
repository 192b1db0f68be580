"""How far apart features are: of one thing seen again and again, of different images of a class, and of classes.

The first table chooses `agent.unknowns.NEAR`: how many images are kept, one after the other, if those nearer than a distance to
a kept one are left out. The second chooses `label.grouping.DISTANCE`: how well the groups fit the classes (adjusted Rand index,
number of groups), with the features seen from zero, and from the mean over other classes.

ImageNet's ViT-Tiny at 96 pixels, frozen. One thing is played by changes of one image: of a still camera and of a moving one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.metrics import adjusted_rand_score

from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.label.grouping import grouped
from sdlora_edge.method import backbones
from sdlora_edge.method.merged import Merged
from sdlora_edge.train.images import images_in

DATA = Path(os.environ.get("SDLORA_EDGE_DATA", "../shared/data"))
SETS = "caltech101_128px_max50.zip", "omniglot_small1.zip", "pacs_128px.zip"
STILL, MOVING = (0.01, 0.0, 0.05, 4.0), (0.04, 3.0, 0.15, 6.0)
"""largest shift (share of the side), turn (degrees), change of the light, and noise (grey levels)"""
KEEP = 0.15, 0.2, 0.25, 0.3
GROUP = 0.55, 0.6, 0.7, 0.8, 0.9
RANDOM = np.random.default_rng(0)


class Eyes:
    """The frozen backbone."""

    def __init__(self) -> None:
        weights = DATA / "vit_tiny_patch16_224.fp16.safetensors"
        backbone, found = backbones.create("vit_tiny_patch16_224", 96, weights, pretrained=False)
        half = (0.5, 0.5, 0.5)
        self._prepare = Preprocessing(**{**found, "mean": half, "std": half})
        self._model = Merged(backbone, {})

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([self._prepare.pixels(image) for image in images])
        parts = [pixels[start : start + 32] for start in range(0, len(pixels), 32)]
        return np.concatenate([self._model.features(self._prepare.normalise(p)) for p in parts])


def seen_again(image: Image.Image, change: tuple[float, float, float, float]) -> Image.Image:
    """The same thing, a moment later."""
    shift, turn, light, noise = change
    along = tuple(RANDOM.uniform(-shift, shift, 2) * image.size)
    border = tuple(int(c) for c in np.asarray(image).mean((0, 1)))
    turned = image.rotate(
        RANDOM.uniform(-turn, turn), Image.Resampling.BILINEAR, translate=along, fillcolor=border
    )
    lit = np.asarray(ImageEnhance.Brightness(turned).enhance(1 + RANDOM.uniform(-light, light)))
    noisy = (lit + RANDOM.normal(0, noise, lit.shape)).clip(0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noisy).save(data, "JPEG", quality=80)
    return Image.open(data).convert("RGB")


def kept(features: np.ndarray, near: float) -> int:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found: list[np.ndarray] = []
    for row in unit:
        if all(1 - row @ other >= near for other in found):
            found.append(row)
    return len(found)


def by_class(name: str) -> dict[str, list[Image.Image]]:
    """Up to 20 images of each class; of PACS the photos alone."""
    found: dict[str, list[Image.Image]] = {}
    for file in images_in(DATA / name, domains=name.startswith("pacs"))[""]:
        own = found.setdefault(file.label, [])
        if not file.problem and file.domain in ("", "photo") and len(own) < 20:
            own.append(file.open().convert("RGB"))
    return found


def main() -> None:
    eyes = Eyes()
    for name in SETS:
        classes = by_class(name)
        chosen = [sorted(classes)[i] for i in RANDOM.permutation(len(classes))[:20]]
        rows: dict[str, list[list[int]]] = {}
        for label in chosen[:8]:
            first = classes[label][0]
            cases = {
                "50 of one thing, still": [seen_again(first, STILL) for _ in range(50)],
                "50 of one thing, moving": [seen_again(first, MOVING) for _ in range(50)],
                "20 of one class": classes[label],
            }
            for case, images in cases.items():
                features = eyes.features(images)
                rows.setdefault(case, []).append([kept(features, near) for near in KEEP])
        print(f"{name}: kept at {KEEP}")
        for case, counts in rows.items():
            print(f"  {case}: {np.mean(counts, 0).round(1)}, at most {np.max(counts, 0)}")
        features = {label: eyes.features(classes[label][:12]) for label in chosen}
        half = len(chosen) // 2
        known = np.concatenate([features[label] for label in chosen[:half]]).mean(0)
        new = np.concatenate([features[label] for label in chosen[half:]])
        truth = [i for i, label in enumerate(chosen[half:]) for _ in features[label]]
        print(f"  groups of {len(chosen) - half} classes at {GROUP}: index/groups")
        for case, centre in (("from zero", np.zeros_like(known)), ("from the known", known)):
            said = []
            for distance in GROUP:
                groups = grouped(new, centre, distance)
                label_of = {i: g for g, own in enumerate(groups) for i in own}
                index = adjusted_rand_score(truth, [label_of[i] for i in range(len(new))])
                said.append(f"{index:.2f}/{len(groups)}")
            print(f"    {case}: {' '.join(said)}", flush=True)


if __name__ == "__main__":
    main()

"""Fifty drawn images and what Pillow makes of them, for the tests of web/src/image.js.

Written to web/test/images.json by `python tests/web/image_cases.py`. The pixels are not in that
file: both sides draw them from the same formula.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sdlora_edge.inputs.image import Preprocessing

PLACE = Path(__file__).resolve().parents[2] / "web" / "test" / "images.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [
    *((320, 240), (240, 320), (640, 427), (427, 640), (500, 500), (224, 224), (256, 256)),
    *((97, 50), (50, 97), (33, 120), (120, 33), (7, 301), (301, 7), (1, 1), (1, 50), (50, 1)),
    *((20, 21), (47, 49), (223, 225), (224, 800), (800, 224), (255, 257), (16, 16), (31, 1000)),
    (1280, 960),
]
RULES = [
    Preprocessing(224, 256, "bicubic", MEAN, STD),
    Preprocessing(224, 249, "bilinear", MEAN, STD),
    Preprocessing(48, 48, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash"),
    Preprocessing(64, 64, "bilinear", MEAN, STD, "border"),
    Preprocessing(63, 40, "bicubic", MEAN, STD),
    Preprocessing(32, 36, "lanczos", MEAN, STD),
    Preprocessing(32, 36, "nearest", MEAN, STD),
]


def drawn(width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): gradients, a texture, and edges that a filter overshoots at."""
    y, x, channel = np.indices((height, width, 3))
    texture = (x * 2654435 + y * 40503 + x * y * 97 + channel * 7919) % 251
    smooth = (x * 3 + y * 2 + channel * 60) % 256
    edges = np.where((x // 5 + y // 7 + channel) % 2, 255, 0)
    kind = (x // 40 + y // 30) % 3
    return np.select([kind == 0, kind == 1], [texture, smooth], edges).astype(np.uint8)


def cases() -> list[dict[str, Any]]:
    """Digests of uint8 (size, size, 3) and of float32 (3, size, size), little endian."""
    found = []
    for i in range(50):
        (width, height), rule = SIZES[i % len(SIZES)], RULES[i % len(RULES)]
        pixels = rule.pixels(drawn(width, height))
        shown = {"width": width, "height": height, "preprocessing": rule.to_manifest()}
        digests = {"pixels": pixels, "input": rule.normalise(pixels[None])}
        found.append(
            shown | {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in digests.items()}
        )
    return found


def text() -> str:
    return "[\n" + ",\n".join(json.dumps(case) for case in cases()) + "\n]\n"


if __name__ == "__main__":
    PLACE.write_text(text())

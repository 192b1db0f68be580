"""Pictures that nobody took: blank ones, views mixed of several, and the cells of a canary.

numpy only.
"""

from __future__ import annotations

import numpy as np

CELLS = 8
"""on each side of a canary's picture"""


def blank(size: int, each: int, seed: int) -> dict[str, np.ndarray]:
    """Make images that show nothing, of five kinds: {kind: uint8 (each, size, size, 3)}.

    They are what a camera sends whose lens is covered, that is blinded, or broken.
    The first black image is all 0 and the first white one all 255. The others have sensor noise.
    """
    random, shape = np.random.RandomState(seed), (each, size, size, 3)
    faint = np.abs(random.normal(0, 2, shape)) * np.arange(each)[:, None, None, None]
    colours = np.broadcast_to(random.randint(0, 256, (each, 1, 1, 3)), shape)
    images = {
        "black": faint,
        "white": 255 - faint,
        "one colour": colours,
        "noise": random.randint(0, 256, shape),
        "grey noise": random.normal(128, 30, shape),
    }
    return {kind: np.clip(found, 0, 255).astype(np.uint8) for kind, found in images.items()}


def cells(size: int, drawn: bytes) -> np.ndarray:
    """Make pictures of CELLS x CELLS coloured cells: uint8 (N, size, size, 3).

    drawn: CELLS x CELLS x 3 bytes for each.
    """
    found = np.frombuffer(drawn, np.uint8).reshape(-1, CELLS, CELLS, 3)
    index = np.arange(size) * CELLS // size
    return found[:, index][:, :, index]


def views(pixels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Make one random view of every image, uint8 (N, S, S, 3).

    An image is turned by quarters, mirrored and shifted by up to a twelfth, and half of it is
    replaced by another's. Views need not look real: they stand where images of other classes might.
    """
    size, reach = pixels.shape[1], pixels.shape[1] // 12
    found = np.empty_like(pixels)
    others = random.permutation(len(pixels))
    for i, j in enumerate(others):
        image = pixels[i].copy()
        cut = random.randint(size // 4, 3 * size // 4)
        half = (slice(cut), slice(None)) if random.rand() < 0.5 else (slice(None), slice(cut))
        image[half] = pixels[j][half]
        image = np.rot90(image, random.randint(4))[:, :: random.choice((1, -1))]
        top, left = random.randint(0, 2 * reach + 1, 2)
        found[i] = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "edge")[
            top : top + size, left : left + size
        ]
    return found

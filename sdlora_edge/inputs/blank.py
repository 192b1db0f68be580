"""Images that show nothing: what a camera sends whose lens is covered, that is blinded, or broken.

numpy only.
"""

from __future__ import annotations

import numpy as np


def blank(size: int, each: int, seed: int) -> dict[str, np.ndarray]:
    """Make images of five kinds, {kind: uint8 (each, size, size, 3)}.

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

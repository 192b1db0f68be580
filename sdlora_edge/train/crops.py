"""Random crops of new images: with few images of a class, its mean and the covariance are steadier.

The statistics of the aligned head take an image and its crops as one image (`FeatureStatistics`).
"""

from __future__ import annotations

import numpy as np
import torch

from .augment import augment, draw
from .evaluator import Evaluator, slices
from .splits import Images

CROPS, UP_TO = 3, 6000
"""crops of each image, and the most images and crops of a task: with many images they are fewer"""


def with_crops(evaluator: Evaluator, images: Images, seed: int) -> np.ndarray:
    """Compute the features of images and of crops of each.

    Args:
        evaluator: Computes the features.
        images: n images.
        seed: Of the crops.

    Returns:
        float32 (views, n, d), the images themselves first.
    """
    found, generator = [evaluator.features(images)], torch.Generator().manual_seed(seed)
    prepare = evaluator.run.preprocessing
    for _ in range(min(CROPS, UP_TO // max(1, len(images)) - 1) * prepare.spatial):
        parts = [found[0][:0]]
        for pixels in images.batches(slices(len(images))):
            ((name, array),) = prepare.arrays(pixels).items()
            chances = draw(len(pixels), "crop", generator)
            shown = augment(torch.from_numpy(array), chances, "crop")
            parts.append(evaluator.features_of({name: shown.numpy()}))
        found.append(np.concatenate(parts))
    return np.stack(found)

"""Random views of images for training.

They are drawn for a whole batch at once, so a seed gives the same views on any number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SCALE, RATIO = (0.6, 1.0), (3 / 4, 4 / 3)
"""of a crop: its share of the image's area, and its width over its height"""


def draw(count: int, kind: str, generator: torch.Generator) -> Tensor:
    """Draw the chances of `count` images: area, ratio, left, top, flip.

    Returns float32 (count, 5) in [0, 1). The kind "none" draws nothing.
    """
    return torch.zeros(count, 5) if kind == "none" else torch.rand(count, 5, generator=generator)


def augment(images: Tensor, chances: Tensor, kind: str) -> Tensor:
    """Make a random view of each image, float32 (N, 3, S, S), on the images' device.

    Args:
        images: float32 (N, 3, S, S).
        chances: What `draw` returns, (N, 5), on the same device.
        kind: "none"; "flip" (left to right, every second image); "crop" (a random part, resized
            back, as in Inception training: area in SCALE, width over height in RATIO); or
            "flip-crop".
    """
    if kind == "none":
        return images
    one = torch.ones_like(chances[:, 0])
    width = height = one
    if "crop" in kind:
        area = SCALE[0] + (SCALE[1] - SCALE[0]) * chances[:, 0]
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** chances[:, 1]
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = (2 * chances[:, 2] - 1) * (1 - width), (2 * chances[:, 3] - 1) * (1 - height)
    mirror = torch.where(chances[:, 4] < 0.5, -one, one) if "flip" in kind else one
    zero = torch.zeros_like(one)
    theta = torch.stack(
        [torch.stack([width * mirror, zero, left], 1), torch.stack([zero, height, top], 1)], 1
    )
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    found = grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return found.contiguous(memory_format=torch.channels_last)

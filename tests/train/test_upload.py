"""Bytes that are normalised on the device: the same numbers as everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.train.augment import augment, draw
from sdlora_edge.train.upload import PictureUpload

PREPARE = Preprocessing(20, 20, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pixels(count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3)).astype(np.uint8)


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_becomes_the_number_that_a_device_in_the_field_computes(device: str) -> None:
    every = np.arange(1200).astype(np.uint8).reshape(1, 20, 20, 3)
    shown = np.concatenate([pixels(), every])
    (found,) = PictureUpload(PREPARE, torch.device(device))(shown)
    assert (found.shape, found.dtype, found.device.type) == ((8, 3, 20, 20), torch.float32, device)
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = PREPARE.normalise(shown)
    assert np.abs(found.cpu().numpy() - wanted).max() <= (0 if device == "cpu" else 1e-6)


def before(images: Tensor, chances: Tensor) -> Tensor:
    """The views of "flip-crop" as the host made them from float32 (N, 3, S, S)."""
    area = 0.6 + 0.4 * chances[:, 0]
    ratio = 0.75 * (4 / 3 / 0.75) ** chances[:, 1]
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = (2 * chances[:, 2] - 1) * (1 - width), (2 * chances[:, 3] - 1) * (1 - height)
    zero, mirror = torch.zeros(len(images)), torch.where(chances[:, 4] < 0.5, -1.0, 1.0)
    rows = [torch.stack([width * mirror, zero, left], 1), torch.stack([zero, height, top], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_uploaded_images_are_those_of_images_normalised_on_the_host(device: str) -> None:
    chances = draw(7, "flip-crop", torch.Generator().manual_seed(3))
    (uploaded,) = PictureUpload(PREPARE, torch.device(device))(pixels())
    found = augment(uploaded, chances.to(device), "flip-crop").cpu()
    wanted = before(torch.from_numpy(PREPARE.normalise(pixels())), chances)
    # An accelerator rounds a view's coordinates otherwise, by some 1e-6 of a pixel.
    assert (found - wanted).abs().max() <= (1e-6 if device == "cpu" else 1e-4)
    assert (found - uploaded.cpu()).abs().max() > 0.1

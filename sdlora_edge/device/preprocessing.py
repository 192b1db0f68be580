"""From a picture to the model's input, with Pillow and numpy: the host trains and evaluates through these same functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

Picture = Union[str, Path, Image.Image, np.ndarray]
"""A file, a Pillow image, or a uint8 array (H, W) or (H, W, 3)."""

MAX_ASPECT = 50
"""a thread of pixels would be blown up to gigabytes"""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` pixels, centre crop of size x size, /255, minus mean, by std. RGB order."""

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not (0 < self.size <= self.resize <= 1 << 14):
            raise ValueError(f"preprocessing: size {self.size}, resize {self.resize}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {', '.join(_FILTERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")

    @classmethod
    def from_manifest(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Raises InputError where the fields do not make sense."""
        try:
            return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the manifest's preprocessing is malformed: {error!r}") from error

    def pixels(self, picture: Picture) -> np.ndarray:
        """uint8 (size, size, 3). EXIF rotation is honoured. Raises InputError naming a picture that cannot be read."""
        name = str(picture) if isinstance(picture, (str, Path)) else "the picture"
        try:
            if isinstance(picture, (str, Path)):
                with Image.open(picture) as opened:
                    return self._pixels(opened)
            return self._pixels(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture)
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise InputError(f"{name} cannot be read as a picture: {error}") from error

    def _pixels(self, image: Image.Image) -> np.ndarray:
        image = ImageOps.exif_transpose(image).convert("RGB")
        width, height = image.size
        if not 0 < max(image.size) <= MAX_ASPECT * min(image.size):
            raise ValueError(f"its shape is {width} x {height}; one side may be up to {MAX_ASPECT} times the other")
        short = min(width, height)
        shape = width * self.resize // short, height * self.resize // short
        if image.size != shape:
            image = image.resize(shape, _FILTERS[self.interpolation])
        left, top = (round((side - self.size) / 2.0) for side in shape)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) to float32 (N, 3, H, W)."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        scaled -= np.array(self.mean, np.float32)
        scaled /= np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

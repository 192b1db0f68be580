"""From an image to the model's input, with Pillow and numpy. The host uses these functions too.

First the image becomes upright 8-bit RGB (`upright`). From there on every number is that of timm's
evaluation transform, but for mean and std, which are rounded to multiples of 2^-24.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ..errors import InputError, UsageError
from ..formats.canonical import UNIT
from ..formats.fields import in_units
from . import pictures
from .image_files import (
    ImageLike,
    as_pillow,
    decoded_pixels,
    images_below,
    refuse_unusable,
    upright,
)
from .modality import Preparation, Tensor, drawn
from .sizes import MAX_PIXELS

_IMAGES = (str, Path, bytes, io.BytesIO, Image.Image, np.ndarray)
_NO_COLLECTION = (bytearray, memoryview, io.IOBase, Mapping)
"""Iterable, but what they yield are bytes, lines or keys, never images."""
ACCEPTED = (
    "a path (str or Path), the bytes of an image file, a Pillow image, "
    "or a uint8 array (H, W, 3) or (H, W)"
)

MAX_SIDE = 1 << 14
MAX_SHIFT = 1000
"""of a mean or a standard deviation"""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PICTURES = "pictures"
"""the model's input: float32 (N, 3, size, size)"""
_PATCH = 16
KEPT, KEPT_QUALITY = 1024, 90
"""of an image that is kept: pixels of its longer side, and JPEG's quality"""
PREVIEW, PREVIEW_QUALITY = 240, 85
"""of one that a web page shows"""
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing(Preparation):
    """Resize, crop at the centre, divide by 255, subtract the mean, divide by std. RGB order.

    Args:
        size: Side of the model's input, in pixels.
        resize: Side before the crop, in pixels: timm's floor(size / crop_pct).
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", as Pillow does them.
        mean: Of each channel, after the division by 255; rounded to a multiple of 2^-24.
        std: Of each channel; rounded in the same way.
        crop_mode: In timm's words. "center": the shorter side becomes `resize` pixels. "squash":
            both sides do. "border": the longer side does, and the rest is filled with the mean
            colour. In the other modes the rest (if `resize` is below `size`) is black.
    """

    kind: ClassVar[str] = "image"
    noun: ClassVar[str] = "image"
    host: ClassVar[str] = "sdlora_edge.train.image_modality:ImageModality"
    suffix: ClassVar[str] = ".jpg"
    tensor: ClassVar[Tensor] = Tensor("images", "UINT8", (-1, -1, -1, 3))
    spatial: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {PICTURES: ("batch",)}
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint8)

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (self.size, self.resize)):
            raise ValueError(f"preprocessing: size {self.size}, resize {self.resize}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode {self.crop_mode!r} is none of {', '.join(CROP_MODES)}")
        if self.interpolation not in _FILTERS:
            raise ValueError(
                f"interpolation {self.interpolation!r} is none of {', '.join(_FILTERS)}"
            )
        # Host and device must use the same numbers, and the manifest holds multiples of UNIT.
        for name in ("mean", "std"):
            exact = tuple(in_units(number) * UNIT for number in getattr(self, name))
            object.__setattr__(self, name, exact)
        if not (_within(-MAX_SHIFT, self.mean) and _within(UNIT, self.std)):
            raise ValueError(
                f"mean {self.mean} and std {self.std} must be three numbers each of at most "
                f"{MAX_SHIFT}, std above 0"
            )

    @classmethod
    def from_manifest(cls, value: Mapping[str, Any], folder: Path = Path()) -> Preprocessing:
        """The inverse of `to_manifest`.

        Raises InputError if a field is missing, unknown or out of bounds.
        """
        try:
            if odd := sorted(value.keys() ^ {field.name for field in fields(cls)}):
                raise ValueError(f"field {odd[0]!r} is missing or unknown")
            shifts = {name: tuple(value[name]) for name in ("mean", "std")}
            if not all(type(number) is int for shift in shifts.values() for number in shift):
                raise TypeError("mean and std must be integers in units of 2^-24")
            fractions = {name: tuple(n * UNIT for n in shift) for name, shift in shifts.items()}
            return cls(**{**value, **fractions})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the manifest's preprocessing is malformed: {error}") from error

    def to_manifest(self) -> dict[str, Any]:
        """JSON with integers only: mean and std in units of 2^-24."""
        shifts = {name: [in_units(n) for n in getattr(self, name)] for name in ("mean", "std")}
        return {**asdict(self), **shifts}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size, 3

    @property
    def settings(self) -> dict[str, Any]:
        return {"image_size": self.size, "mean": self.mean, "std": self.std}

    @property
    def described(self) -> str:
        return (
            f"images of {self.size} x {self.size} pixels, {self.interpolation}, "
            f"{self.crop_mode} crop"
        )

    @property
    def tokens(self) -> float:
        return self.size**2 / _PATCH**2

    def item(self, raw: Any, limit: int | None = None) -> np.ndarray:
        """As `pixels`. limit: pixels. Raises TypeError if it is no image."""
        return self.pixels(require_image(raw), MAX_PIXELS if limit is None else limit)

    def many(self, value: Any) -> tuple[Iterable[Any], bool]:
        return one_or_many(value)

    @staticmethod
    def kept(raw: Any, change: Callable[[Any], Any] | None = None) -> bytes:
        """A JPEG: upright, at most KEPT pixels wide and high. change: gets a Pillow image."""
        found = _opened(raw)
        found.thumbnail((KEPT, KEPT))
        if change is not None:
            found = change(found)
            if not isinstance(found, Image.Image):
                raise UsageError(
                    f"the function of --blur returned a {type(found).__name__}: "
                    "return a Pillow image"
                )
        return _jpeg(found, KEPT_QUALITY)

    @staticmethod
    def preview(path: Path) -> tuple[str, bytes]:
        """A JPEG of at most PREVIEW pixels."""
        found = _opened(path)
        found.thumbnail((PREVIEW, PREVIEW))
        return "image/jpeg", _jpeg(found, PREVIEW_QUALITY)

    def decoded(self, raw: Any) -> int:
        return decoded_pixels(require_image(raw))

    def named(self, argument: str) -> Iterator[tuple[str, Any]]:
        """A file, or all images below a folder."""
        return ((name, name) for name in images_below(argument))

    def streamed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """One image."""
        yield "-", data

    def arrays(self, items: np.ndarray) -> dict[str, np.ndarray]:
        return {PICTURES: self.normalise(items)}

    def canary(self, seed: int, count: int) -> dict[str, np.ndarray]:
        return self.arrays(pictures.cells(self.size, drawn(seed, count * 3 * pictures.CELLS**2)))

    def seen(self, item: np.ndarray) -> np.ndarray | str:
        return item

    def samples(self, count: int) -> list[Any]:
        random = np.random.default_rng(0)
        return list(random.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8))

    def views(self, items: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        return pictures.views(items, random)

    def blank(self, each: int, seed: int) -> dict[str, np.ndarray]:
        return pictures.blank(self.size, each, seed)

    def pixels(self, image: ImageLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """An image, upright, as uint8 (size, size, 3).

        Raises:
            InputError: It cannot be read, or has more than `max_pixels` pixels; the message names
                it.
        """
        with as_pillow(image) as opened:
            return self.prepared(opened, max_pixels)

    def prepared(self, image: Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The same of an open image. Raises whatever Pillow does: call it inside `reading`."""
        refuse_unusable(image, max_pixels)
        image = upright(image)
        shape = self._resized(*image.size)
        if image.size != shape:
            # rows first, as docs/packet.md says: Pillow 13 begins with the columns of a tall image
            filter = _FILTERS[self.interpolation]
            image = image.resize((shape[0], image.height), filter).resize(shape, filter)
        fill = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        cropped = Image.new("RGB", (self.size, self.size), fill)
        # torchvision rounds half a pixel to even when it crops, and down when it pads
        left, top = (
            (self.size - side) // 2 if side < self.size else -round((side - self.size) / 2)
            for side in shape
        )
        cropped.paste(image, (left, top))
        return np.asarray(cropped)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before the crop."""
        if self.crop_mode == "squash":
            return self.resize, self.resize
        if (
            self.crop_mode == "border"
        ):  # in float64, as timm has it: the rounding is part of the rule
            ratio = max(width / self.resize, height / self.resize)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        short = min(width, height)
        return width * self.resize // short, height * self.resize // short

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) to float32 (N, 3, H, W)."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        scaled -= np.array(self.mean, np.float32)
        scaled /= np.array(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _opened(raw: ImageLike) -> Image.Image:
    """Upright, in 8-bit RGB. Raises InputError if it cannot be read."""
    with as_pillow(raw) as opened:
        refuse_unusable(opened, MAX_PIXELS)
        return upright(opened)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()  # without EXIF, which may say where and when
    image.convert("RGB").save(data, "JPEG", quality=quality, exif=b"")
    return data.getvalue()


def one_or_many(value: ImageLike | Iterable[ImageLike]) -> tuple[Iterable[ImageLike], bool]:
    """The images in a value, and whether the value is itself one image.

    An array (N, H, W, 3) holds many.

    Raises:
        TypeError: It is neither an image nor an iterable.
    """
    if isinstance(value, np.ndarray) and value.ndim == 4:
        return list(value), False
    if isinstance(value, _IMAGES):
        return [require_image(value)], True
    if not isinstance(value, Iterable) or isinstance(value, _NO_COLLECTION):
        raise _no_image(value)
    return value, False


def require_image(value: ImageLike) -> ImageLike:
    """The same value. Raises TypeError if it is no image."""
    if not isinstance(value, _IMAGES):
        raise _no_image(value)
    if isinstance(value, np.ndarray) and not (
        value.dtype == np.uint8 and (value.ndim == 2 or value.shape[2:] == (3,))
    ):
        raise _no_image(value)
    return value


def _no_image(value: object) -> TypeError:
    what = f"{type(value).__name__}"
    if isinstance(value, np.ndarray):
        what = f"{value.dtype} array {value.shape}"
    article = "an" if what[0] in "aeio" else "a"
    return TypeError(f"{article} {what} is no image: pass {ACCEPTED}, or an iterable of these")


def _within(least: float, channels: tuple[float, ...]) -> bool:
    return len(channels) == 3 and all(least <= number <= MAX_SHIFT for number in channels)

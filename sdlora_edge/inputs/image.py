"""From an image to the model's input, with Pillow and numpy. The host uses these functions too.

First the image becomes upright 8-bit RGB (`upright`). From there on every number is that of timm's
evaluation transform, but for mean and std, which are rounded to multiples of 2^-24.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError, SdloraError
from ..formats.canonical import UNIT
from ..formats.fields import in_units
from ..shortage import shortage
from ..storage import disk
from .sizes import MAX_FILE, MAX_PIXELS

try:
    from PIL.AvifImagePlugin import SUPPORTED as _AVIF
except ImportError:  # Pillow before 11.3
    _AVIF = False

ImageLike = Union[str, Path, bytes, io.BytesIO, Image.Image, np.ndarray]
"""A file or its bytes, a Pillow image, or a uint8 array (H, W) or (H, W, 3)."""
_IMAGES = (str, Path, bytes, io.BytesIO, Image.Image, np.ndarray)
_NO_COLLECTION = (bytearray, memoryview, io.IOBase, Mapping)
"""Iterable, but what they yield are bytes, lines or keys, never images."""
ACCEPTED = (
    "a path (str or Path), the bytes of an image file, a Pillow image, "
    "or a uint8 array (H, W, 3) or (H, W)"
)

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
"""The formats that are read, by Pillow's names, each with its suffixes. Pillow knows more; some
start other programs."""
_NEEDED = {
    "AVIF": "needs Pillow 11.3 or newer, with AVIF",
    "HEIF": "needs pip install 'sdlora-edge[heif]'",
}
SUFFIXES = frozenset(suffix for own in FORMATS.values() for suffix in own)
MAX_ASPECT = 50
"""a thread of pixels would be blown up to gigabytes"""
MAX_SIDE = 1 << 14
MAX_SHIFT = 1000
"""of a mean or a standard deviation"""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_ORIENTATION = 0x0112
"""the EXIF tag"""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
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
    def from_manifest(cls, value: Mapping[str, Any]) -> Preprocessing:
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


@contextmanager
def reading(name: str, kind: str = "an image") -> Iterator[None]:
    """Turn whatever Pillow raises in this block into an InputError that begins with `name`.

    Raises ResourceError instead if the machine ran short: that says nothing about the image.
    """
    try:
        yield
    except SdloraError:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        damaged = InputError(f"{name} cannot be read as {kind}: {str(error) or repr(error)}")
        raise shortage(error, f"while {name} was read") or damaged from error


@contextmanager
def as_pillow(image: ImageLike) -> Iterator[Image.Image]:
    """Open whatever is an image. What goes wrong with it in this block is an InputError."""
    with reading(str(image) if isinstance(image, (str, Path)) else "the image"):
        if isinstance(image, bytes):
            image = io.BytesIO(image)
        if isinstance(image, (str, Path, io.BytesIO)):
            with open_image(image) as opened:
                yield opened
        else:
            yield Image.fromarray(image) if isinstance(image, np.ndarray) else image


def open_image(file: str | Path | io.BytesIO) -> Image.Image:
    """Read the header of an image in one of FORMATS.

    Raises whatever Pillow does: call it inside `reading`.
    """
    if isinstance(file, io.BytesIO):
        return _identified(file)
    stream = disk.opened(
        Path(file)
    )  # not by its name, which may be another file's, or a pipe's, a moment later
    try:
        refuse_large_file(os.fstat(stream.fileno()).st_size)
        image = _identified(stream)
    except BaseException:
        stream.close()
        raise
    # As Pillow does with files it opens: the file is closed with the image.
    image._exclusive_fp = True  # type: ignore[attr-defined]
    return image


def _identified(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=readable())
    except UnidentifiedImageError:  # it names an address in memory
        raise ValueError(f"it is damaged, or none of {', '.join(readable())}") from None


@functools.cache
def readable() -> tuple[str, ...]:
    """Those of FORMATS that can be read here."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        optional = {"AVIF": _AVIF, "HEIF": True}
    except ImportError:
        optional = {"AVIF": _AVIF, "HEIF": False}
    return tuple(name for name in FORMATS if optional.get(name, True))


def suffix_problem(suffix: str) -> str:
    """Why files of this suffix (one of SUFFIXES) cannot be read here; empty if they can."""
    name = next(name for name, own in FORMATS.items() if suffix in own)
    return "" if name in readable() else _NEEDED[name]


def refuse_unusable(image: Image.Image, max_pixels: int) -> None:
    """Raises ValueError if no model input can be made of an image. It need not be decoded yet.

    It has more than `max_pixels`, or a tile of it would; it is a thread of pixels; or its pixels
    have no known range.
    """
    for width, height in _decoded_sizes(image):
        if width * height > max_pixels:
            raise ValueError(
                f"its {width} x {height} pixels are more than "
                f"the {max_pixels / 1e6:g} megapixels allowed: "
                "make it smaller (train and device predict have --max-megapixels)"
            )
    width, height = image.size
    if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
        raise ValueError(
            f"its shape is {width} x {height}; one side may be up to {MAX_ASPECT} times the other"
        )
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits"
        )


def _decoded_sizes(image: Image.Image) -> list[tuple[int, int]]:
    """(width, height) of all that is decoded: of a TIFF, tiles too. A small image may be cut from
    one of gigabytes."""
    tags = getattr(image, "tag_v2", {})
    return [image.size, (tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0))]


def decoded_pixels(image: ImageLike) -> int:
    """Number of pixels that are decoded at a time, from the header alone.

    Raises InputError if it cannot be read.
    """
    with as_pillow(image) as opened:
        return max(width * height for width, height in _decoded_sizes(opened))


def refuse_large_file(size: int) -> None:
    """Raises ValueError for a file of more than MAX_FILE bytes."""
    if size > MAX_FILE:
        raise ValueError(f"its {size} bytes are more than the {MAX_FILE} allowed: make it smaller")


def upright(image: Image.Image) -> Image.Image:
    """The image as people see it, in 8-bit RGB.

    It is turned as its EXIF or XMP says. A damaged EXIF block counts as none. Colours are those of
    Pillow's `convert("RGB")`: transparency is dropped, so a transparent pixel shows the colour
    stored under it. Two kinds of images differ, because `convert` makes them all white. 16-bit grey
    (and 32-bit, read as 0 to 65535) keeps its high byte. Floating-point pixels have no known range:
    `refuse_unusable` refuses them before.
    """
    _load(image)
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever a damaged table leads Pillow to: the pixels are intact
        turn = None
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif isinstance(image.info.get("transparency"), bytes):
        # Otherwise Pillow warns about each such image.
        image = image.copy()
        del image.info["transparency"]
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _load(image: Image.Image) -> None:
    """Read the pixels now: a TIFF turns itself then; a PNG may have its EXIF behind the pixels."""
    filename = getattr(image, "filename", "")
    # If an image has a file name, Pillow maps it into memory, and (13 at least) scrambles the rows
    # of a turned TIFF.
    if filename:
        image.filename = ""  # type: ignore[attr-defined]
    image.load()
    if filename:
        image.filename = filename  # type: ignore[attr-defined]

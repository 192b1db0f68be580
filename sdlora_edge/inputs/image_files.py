"""Opening image files: which formats are read, what is refused, and which way is up."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError, SdloraError
from ..shortage import shortage
from ..storage import disk
from .sizes import MAX_FILE

try:
    from PIL.AvifImagePlugin import SUPPORTED as _AVIF
except ImportError:  # Pillow before 11.3
    _AVIF = False

ImageLike = Union[str, Path, bytes, io.BytesIO, Image.Image, np.ndarray]
"""A file or its bytes, a Pillow image, or a uint8 array (H, W) or (H, W, 3)."""
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


def images_below(path: str) -> Iterator[str]:
    """The path itself, or, if it is a folder, every image below it, sorted.

    Raises:
        InputError: A folder holds no image, or cannot be read.
    """

    def unread(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    if not os.path.isdir(path):
        yield path
        return
    found = False
    for folder, below, names in os.walk(path, onerror=unread):
        below.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                found = True
                yield os.path.join(folder, name)
    if not found:
        raise InputError(
            f"{path} holds no image: name a folder with images ({', '.join(sorted(SUFFIXES))})"
        )


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

"""Section 7 of docs/packet.md, from that page alone: from a PNG file to the model's input.

Part of `vectors_reader`, which says more.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

UNIT = 2**24


def pictures(data: bytes, preprocessing: dict[str, Any]) -> np.ndarray:
    """float32 (1, 3, size, size)."""
    p, image = preprocessing, png(data)
    height, width = image.shape[:2]
    wide, high = new_size(width, height, p["resize"], p["crop_mode"])
    image = resized(image, wide, high, p["interpolation"])
    mean, std = (np.float32(np.array(p[name]) / UNIT) for name in ("mean", "std"))
    colour = [round(255 * m / UNIT) if p["crop_mode"] == "border" else 0 for m in p["mean"]]
    pixels = cropped(image, p["size"], colour)
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def png(data: bytes) -> np.ndarray:
    """uint8 (height, width, 3), of a file of 8-bit RGB whose rows are not filtered."""
    place, packed = 8, b""
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height = (int.from_bytes(body[i : i + 4], "big") for i in (0, 4))
        packed += body if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    return rows[:, 1:].reshape(height, width, 3)


def new_size(width: int, height: int, resize: int, mode: str) -> tuple[int, int]:
    if mode == "squash":
        return resize, resize
    if mode == "border":
        ratio = max(width / resize, height / resize)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    short = min(width, height)
    return width * resize // short, height * resize // short


def cropped(image: np.ndarray, size: int, colour: list[int]) -> np.ndarray:
    result = np.empty((size, size, 3), np.uint8)
    result[:] = colour
    places = []
    for side in image.shape[:2]:
        if side < size:
            begin = (size - side) // 2
            places.append((slice(begin, begin + side), slice(0, side)))
        else:
            begin = round((side - size) / 2)
            places.append((slice(0, size), slice(begin, begin + size)))
    (rows, own_rows), (columns, own_columns) = places
    result[rows, columns] = image[own_rows, own_columns]
    return result


def resized(image: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """Rows first, then columns."""
    image = one_pass(image, width, interpolation)
    return one_pass(image.transpose(1, 0, 2), height, interpolation).transpose(1, 0, 2)


def one_pass(image: np.ndarray, m: int, interpolation: str) -> np.ndarray:
    """uint8 (rows, n, 3) to (rows, m, 3)."""
    n = image.shape[1]
    if n == m:
        return image
    scale = n / m
    if interpolation == "nearest":
        places = itertools.accumulate([scale * 0.5] + [scale] * (m - 1))
        return image[:, [int(place) for place in places]]
    support, kernel = FILTERS[interpolation]
    stretch = max(scale, 1.0)
    columns = []
    for i in range(m):
        center = (i + 0.5) * scale
        first = max(0, int(center - support * stretch + 0.5))
        last = min(n, int(center + support * stretch + 0.5))
        w = [kernel((j - center + 0.5) * (1 / stretch)) for j in range(first, last)]
        w = [x / sum(w) for x in w]
        q = np.array([int(x * 2**22 + (0.5 if x >= 0 else -0.5)) for x in w], np.int64)
        total = 2**21 + (image[:, first:last].astype(np.int64) * q[:, None]).sum(axis=1)
        columns.append((total >> 22).clip(0, 255).astype(np.uint8))
    return np.stack(columns, axis=1)


def bilinear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def lanczos(x: float) -> float:
    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


def sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "bilinear": (1, bilinear),
    "bicubic": (2, bicubic),
    "lanczos": (3, lanczos),
}

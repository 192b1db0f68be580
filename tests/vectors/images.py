"""Images of the test vectors, and the tensors that a model gets of them."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from sdlora_edge.inputs.image import Preprocessing

WIDTH, HEIGHT = 23, 17
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {
    "center-bicubic": Preprocessing(8, 9, "bicubic", MEAN, STD),
    "center-bilinear-odd": Preprocessing(7, 10, "bilinear", MEAN, STD),
    "center-lanczos": Preprocessing(11, 12, "lanczos", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "center-nearest": Preprocessing(8, 10, "nearest", MEAN, STD),
    "center-enlarged": Preprocessing(21, 24, "bicubic", MEAN, STD),
    "center-padded": Preprocessing(12, 7, "bilinear", MEAN, STD),
    "squash": Preprocessing(9, 9, "bicubic", MEAN, STD, "squash"),
    "border": Preprocessing(10, 10, "bicubic", MEAN, STD, "border"),
    "as-it-is": Preprocessing(17, 17, "bicubic", MEAN, STD),
}


def drawn() -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3): a gradient, noise, and hard edges that a filter overshoots at."""
    noise = hashlib.shake_256(b"sdlora-edge vectors image").digest(HEIGHT * WIDTH * 3)
    pixels = np.frombuffer(noise, np.uint8).reshape(HEIGHT, WIDTH, 3) // 4
    rows, columns = np.indices((HEIGHT, WIDTH))
    pixels = pixels + (rows * 5 + columns * 4)[..., None].astype(np.uint8)
    pixels[3:9, 5:12], pixels[9:15, 12:19] = 255, 0
    return pixels.astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Stored, not compressed: the same bytes with every zlib."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write(folder: Path) -> list[dict[str, Any]]:
    """Into this folder. Returns `images` of vectors.json."""
    folder.mkdir()
    (folder / "edges.png").write_bytes(png(drawn()))
    found = []
    for name, prepare in CASES.items():
        tensor = prepare.normalise(prepare.pixels(folder / "edges.png")[None])
        (folder / f"{name}.safetensors").write_bytes(safetensors.numpy.save({"pictures": tensor}))
        entry = {"image": "edges.png", "preprocessing": prepare.to_manifest(), "tensor": name}
        found.append(entry)
    return found

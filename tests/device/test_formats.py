"""Which image files are read, by host and device alike, and that one that cannot be read is that image's error and no more."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Fleet
from PIL import Image, ImageFile

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, ResourceError
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.inputs.image_files import FORMATS, open_image, readable, reading, suffix_problem
from sdlora_edge.inputs.sizes import MAX_FILE

PREPARE = Preprocessing(24, 24, "bilinear", (0.5,) * 3, (0.5,) * 3)
WRITABLE = [name for name in readable() if name != "HEIF"]


def image(width: int = 32, height: int = 24, level: int = 0) -> Image.Image:
    pixels = np.random.default_rng(level).integers(0, 100, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels + np.uint8(level))


def stored(kind: str, photo: Image.Image | None = None) -> bytes:
    stream = io.BytesIO()
    (photo or image()).save(stream, kind)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with_profile() -> bytes:
    """What some scanners write: an ICC profile of 2 MiB."""
    data = stored("PNG")
    return data[:33] + chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2 << 20))) + data[33:]


def tiff_with_tile(side: int) -> bytes:
    tags = [
        (256, 64),
        (257, 64),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, side),
        (323, side),
        (324, 300),
        (325, 60),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return (head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)).ljust(
        300, b"\0"
    ) + bytes(60)


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_format_is_read_by_its_content_whatever_its_suffix(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.anything").write_bytes(stored(kind))
    assert PREPARE.pixels(tmp_path / "x.anything").shape == (24, 24, 3)


@pytest.mark.skipif("AVIF" not in readable(), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_has_it() -> None:
    assert suffix_problem(".avif") == ""


def test_heic_needs_its_extra_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    readable.cache_clear()
    try:
        assert "HEIF" not in readable()
        assert suffix_problem(".heic") == "needs pip install 'sdlora-edge[heif]'"
    finally:
        readable.cache_clear()


def test_heic_is_read_with_its_extra(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    gradient = Image.linear_gradient("L").convert("RGB")
    heif.from_pillow(gradient).save(tmp_path / "a.heic")
    assert suffix_problem(".heic") == ""
    np.testing.assert_allclose(
        PREPARE.pixels(tmp_path / "a.heic"), PREPARE.pixels(gradient), atol=8
    )
    with pytest.raises(InputError, match="megapixels allowed"):
        PREPARE.pixels(tmp_path / "a.heic", 1000)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n",
        stored("JPEG2000"),
        stored("ICO"),
        stored("TGA"),
        stored("PCX"),
        stored("PDF"),
        b"",
        b"hello",
    ],
)
def test_what_is_on_no_list_is_never_opened(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # look for Ghostscript once more
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(
        InputError,
        match=r"a\.png cannot be read as an image: it is damaged, or none of JPEG, PNG, ",
    ):
        PREPARE.pixels(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", WRITABLE)
def test_pixels_are_limited_in_every_format_before_they_are_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(stored(kind))
    assert PREPARE.pixels(tmp_path / "a", 32 * 24).shape == (24, 24, 3)
    with Image.open(tmp_path / "a") as opened:
        monkeypatch.setattr(type(opened), "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(
            InputError,
            match=r"its 32 x 24 pixels are more than the 0.000767 megapixels .* --max-megapixels",
        ):
            PREPARE.pixels(tmp_path / "a", 32 * 24 - 1)


def test_pixels_are_limited_in_arrays_images_and_tiles(tmp_path: Path) -> None:
    (tmp_path / "tile.tif").write_bytes(tiff_with_tile(40_000))
    for photo in (
        np.zeros((30, 40), np.uint8),
        np.zeros((30, 40, 3), np.uint8),
        image(40, 30),
        tmp_path / "tile.tif",
    ):
        with pytest.raises(InputError, match="megapixels allowed"):
            PREPARE.pixels(photo, 1199 if not isinstance(photo, Path) else 10**9)
    for frames in ("GIF", "PNG", "WEBP", "TIFF"):  # a small first frame, and a large one after it
        stream = io.BytesIO()
        image().save(stream, frames, save_all=True, append_images=[image(32, 24, 50)])
        (tmp_path / "b").write_bytes(stream.getvalue())
        assert PREPARE.pixels(tmp_path / "b", 32 * 24).shape == (24, 24, 3)


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(9001)) for _ in range(9000)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    (tmp_path / "tile.tif").write_bytes(tiff_with_tile(30_000))
    program = """
import resource, sys
from sdlora_edge.inputs.image import Preprocessing
from sdlora_edge.errors import InputError
prepare = Preprocessing(24, 24, "bilinear", (0.5,) * 3, (0.5,) * 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        prepare.pixels(name)
    except InputError:
        continue
    raise SystemExit(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    names = [tmp_path / "bomb.png", tmp_path / "tile.tif"]
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000  # kB


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(PREPARE.pixels(tmp_path / "a"), np.asarray(frames[0]), atol=8)


# ---- whatever a file leads Pillow to


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError("truncated"),
            ValueError("profile"),
            SyntaxError("not a TIFF"),
            EOFError("no more"),
            struct.error("short"),
        ),
        *(
            OverflowError("too far"),
            zlib.error("bad stream"),
            IndexError("list"),
            KeyError(3),
            TypeError("none"),
            RuntimeError(),
        ),
        *(
            AttributeError("no tile"),
            NotImplementedError("mode"),
            UnicodeDecodeError("ascii", b"", 0, 1, "x"),
            RecursionError(),
        ),
        *(Image.DecompressionBombError("size"), AssertionError(), ZeroDivisionError("no height")),
    ],
)
@pytest.mark.parametrize("where", ["open", "load"])
def test_anything_pillow_raises_is_an_error_of_that_image(
    where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "a.png").write_bytes(stored("PNG"))
    monkeypatch.setattr(
        *((Image, "open") if where == "open" else (ImageFile.ImageFile, "load")), fail
    )
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image: ."):
        PREPARE.pixels(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(errno.ENOMEM, "x"),
            OSError(errno.EMFILE, "x"),
            OSError("out of memory error when reading image file"),
        ),
        MemoryError(),
    ],
)
def test_a_machine_that_ran_short_says_nothing_about_an_image(error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"ran out while a\.png was read.*try again"),
        reading("a.png"),
    ):
        raise error


@pytest.mark.parametrize(
    "data", [png_with_profile(), b"P6\n32 3", b"P5\n", b"P6 8000 7900 255\n", tiff_with_tile(64)]
)
def test_damaged_headers_are_that_images_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image: ."):
        PREPARE.pixels(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what is wrong with each
@pytest.mark.parametrize("kind", WRITABLE)
def test_a_damaged_file_of_any_format_is_an_image_or_an_input_error(kind: str) -> None:
    whole, random = stored(kind, image(9, 7)), np.random.default_rng(0)
    for i in range(150):
        data = bytearray(whole[: random.integers(len(whole))] if i % 3 == 0 else whole)
        for _ in range(i % 3 * 2):
            data[random.integers(len(data))] = random.integers(256)
        with contextlib.suppress(InputError), reading("a"), open_image(io.BytesIO(data)) as opened:
            assert PREPARE.prepared(opened, 10**6).shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("make", "said"), [(os.mkfifo, "not a file, but a pipe"), (os.mkdir, "Is a directory")]
)
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=said):
        PREPARE.pixels(tmp_path / "a.png")


def grown(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(MAX_FILE + 1)


@pytest.mark.parametrize(
    ("make", "said"), [(os.mkfifo, "a pipe"), (grown, f"{MAX_FILE + 1} bytes are more than")]
)
def test_what_takes_the_place_of_a_file_is_examined_too(
    make: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ask = tmp_path / "a.bmp", os.stat
    image(9, 7).save(path)

    def swapping(asked: object, *rest: Any, **options: Any) -> os.stat_result:
        found = ask(asked, *rest, **options)  # type: ignore[call-overload]
        if asked in (path, str(path)):
            path.unlink()
            make(path)
        return found  # type: ignore[no-any-return]

    monkeypatch.setattr(os, "stat", swapping)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(10)  # for whoever waits for the pipe
    try:
        with pytest.raises(InputError, match=said):
            PREPARE.pixels(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [*WRITABLE, "damaged", "cut"])
def test_a_file_is_closed_with_its_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(
        {"damaged": b"no image", "cut": stored("PNG", image(90, 70))[:200]}.get(kind)
        or stored(kind, image(9, 7))
    )
    held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    kept = []
    with warnings.catch_warnings(), contextlib.suppress(InputError), reading("a"):
        warnings.simplefilter("error")
        with open_image(path) as opened:
            kept.append(opened)
            PREPARE.prepared(opened)
    after = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(path) not in held + after


def test_a_file_that_is_too_large_is_not_begun(tmp_path: Path) -> None:
    with open(tmp_path / "a.webp", "wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(InputError, match=f"{MAX_FILE + 1} bytes are more than"):
        PREPARE.pixels(tmp_path / "a.webp")


def test_every_format_has_suffixes_of_its_own() -> None:
    every = [suffix for own in FORMATS.values() for suffix in own]
    assert len(every) == len(set(every))
    assert {".jfif", ".jpe", ".avif", ".heic"} <= set(every)


# ---- on a device


def test_a_device_limits_pixels_too(
    fleet: Fleet, store: Path, tmp_path: Path, cli: Callable[..., object]
) -> None:
    image(1500, 1000).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="1500 x 1000"):
        Device.open(store).predict([tmp_path / "a.png"], max_pixels=10**6)
    assert len(Device.open(store).predict([tmp_path / "a.png"])) == 1
    refused = cli("device", "predict", tmp_path / "a.png", "--store", store, "--max-megapixels", 1)
    assert refused.code == 3  # type: ignore[attr-defined]
    assert "1 megapixels allowed" in refused.err  # type: ignore[attr-defined]
    assert (
        cli("device", "predict", tmp_path / "a.png", "--store", store, "--max-megapixels", 2).code
        == 0
    )  # type: ignore[attr-defined]

"""Pillow and numpy on the device give what timm's own evaluation transform gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from timm.data import create_transform
from vectors.images import png
from vectors_image import pictures

from sdlora_edge.errors import InputError
from sdlora_edge.inputs.image import CROP_MODES, Preprocessing
from sdlora_edge.inputs.image_files import ImageLike, upright

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


SIDE = 48
RESIZE = Image.Image.resize


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise for the rounding, over a gradient for the crop: a photo moved by one pixel is another one."""
    gradient = np.add.outer(2 * np.arange(height), 3 * np.arange(width))[:, :, None] % 170
    pixels = gradient + np.random.default_rng(width).integers(0, 85, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def timms(image: Image.Image, size: int, crop: float, interpolation: str, mode: str) -> np.ndarray:
    """float32 (3, size, size), by timm's own transform."""
    shape = 3, size, size
    transform = create_transform(
        shape, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop, crop_mode=mode
    )
    with patch.object(Image.Image, "resize", rows_first):
        return transform(image).numpy()


def rows_first(image: Image.Image, shape: tuple[int, int], resample: int) -> Image.Image:
    """`resize` as before Pillow 13, which begins with the columns of a tall image."""
    narrow = RESIZE(image, (shape[0], image.height), resample)
    return RESIZE(narrow, shape, resample)


def ours(
    photo: ImageLike, size: int, crop: float, interpolation: str = "bilinear", mode: str = "center"
) -> np.ndarray:
    prepare = Preprocessing(size, int(size / crop), interpolation, MEAN, STD, mode)
    return prepare.normalise(prepare.pixels(photo)[None])[0]


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [1.15, 1.0, 0.95, 0.9, 0.875, 0.5])
def test_it_is_timms_transform(interpolation: str, crop: float, mode: str) -> None:
    for shape in [
        (64, 64),
        (97, 50),
        (33, 120),
        (20, 21),
        (47, 49),
        (7, 301),
        (301, 7),
        (48, 48),
        (1, 1),
        (224, 225),
    ]:
        image = noise(*shape)
        found, expected = (
            ours(image, SIDE, crop, interpolation, mode),
            timms(image, SIDE, crop, interpolation, mode),
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=str(shape))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    short=st.integers(1, 90),
    aspect=st.floats(1, 12),
    wide=st.booleans(),
    size=st.integers(8, 64),
    crop=st.floats(0.4, 1.3),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    mode=st.sampled_from(CROP_MODES),
)
def test_it_is_timms_transform_at_every_size(
    short: int, aspect: float, wide: bool, size: int, crop: float, interpolation: str, mode: str
) -> None:
    long = int(short * aspect)
    image = noise(long, short) if wide else noise(short, long)
    assume(
        mode != "border" or min(image.size) * int(size / crop) >= max(image.size)
    )  # else timm makes a side of 0 pixels
    np.testing.assert_allclose(
        ours(image, size, crop, interpolation, mode),
        timms(image, size, crop, interpolation, mode),
        rtol=0,
        atol=1e-6,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    size=st.integers(1, 40),
    resize=st.integers(1, 50),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    mode=st.sampled_from(CROP_MODES),
)
def test_it_is_what_the_page_on_packets_says_with_every_pillow(
    width: int, height: int, size: int, resize: int, interpolation: str, mode: str
) -> None:
    """Black and white pixels: the filters overshoot, so the order of the passes shows."""
    assume(max(width, height) <= 50 * min(width, height))
    random = np.random.default_rng(width * height)
    pixels = 255 * random.integers(0, 2, (height, width, 3), dtype=np.uint8)
    prepare = Preprocessing(size, resize, interpolation, MEAN, STD, mode)
    found = prepare.normalise(prepare.pixels(pixels)[None])
    np.testing.assert_array_equal(found, pictures(png(pixels), prepare.to_manifest()))


FILES = {  # how each kind of photo is made and stored, and the mode in which Pillow opens it
    "RGB.jpg": ("RGB", {"quality": 90}, "RGB"),
    "RGB.webp": ("RGB", {"lossless": True}, "RGB"),
    "RGB.png": ("RGB", {}, "RGB"),
    "key colour.png": ("RGB", {"transparency": (9, 9, 9)}, "RGB"),
    "L.png": ("L", {}, "L"),
    "L.jpg": ("L", {}, "L"),
    "L transparent.png": ("L", {"transparency": 5}, "L"),
    "LA.png": ("LA", {}, "LA"),
    "one bit.png": ("1", {}, "1"),
    "palette.png": ("P", {}, "P"),
    "palette, one transparent.png": ("P", {"transparency": 3}, "P"),
    "palette, translucent.png": ("P", {"transparency": bytes(range(0, 250, 2))}, "P"),
    "palette.gif": ("P", {"transparency": 0}, "P"),
    "RGBA.png": ("RGBA", {}, "RGBA"),
    "RGBA.webp": ("RGBA", {"lossless": True, "exact": True}, "RGBA"),
    "CMYK.jpg": ("CMYK", {"quality": 95}, "CMYK"),
}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_is_read_upright_and_as_timm_reads_rgb(
    name: str, turn: int, tmp_path: Path
) -> None:
    kind, options, stored = FILES[name]
    image = noise(51, 38, kind)
    if "A" in kind:  # translucent, and with colours under what cannot be seen
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / name, **options, **({} if name.endswith("gif") else {"exif": exif}))
    with Image.open(tmp_path / name) as opened, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's, about translucent palettes; ours below must not warn
        assert opened.mode == stored
        reference = ImageOps.exif_transpose(opened).convert("RGB")
    assert reference.size == ((38, 51) if turn > 4 and not name.endswith("gif") else (51, 38))
    for interpolation in ("bilinear", "bicubic"):
        expected = timms(reference, SIDE, 0.9, interpolation, "center")
        np.testing.assert_allclose(
            ours(tmp_path / name, SIDE, 0.9, interpolation), expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_grey_keeps_its_high_byte_and_its_turn(kind: str, tmp_path: Path) -> None:
    """Pillow's own conversion makes every value above 255 white: the whole photo of an industrial camera."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (20, 30)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"p.{kind}", exif=exif)
    expected = np.rot90(pixels >> 8, -1)
    found = np.asarray(upright(Image.open(tmp_path / f"p.{kind}")))
    np.testing.assert_array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))
    Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / f"8.{kind}", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(upright(Image.open(tmp_path / f"8.{kind}")))[:, :, 0], expected
    )
    for wider in (pixels.astype(np.int32), pixels.astype(">u2")):
        np.testing.assert_array_equal(
            np.asarray(upright(Image.fromarray(wider)))[:, :, 1], pixels >> 8
        )


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what is wrong with each table
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_does_not_cost_the_image(kind: str, tmp_path: Path) -> None:
    image, exif = noise(24, 24), Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 1, "a camera", 1.5
    whole, random = exif.tobytes(), np.random.default_rng(0)
    image.save(tmp_path / f"whole.{kind}")
    expected = ours(tmp_path / f"whole.{kind}", 24, 1.0)
    for length in range(6, len(whole), 3):
        damaged = bytearray(whole[:length])
        damaged[random.integers(6, length) if length > 6 else 5] ^= 1 << random.integers(8)
        if int.from_bytes(damaged[24:26], "big") in range(2, 9):
            continue  # the damage has made another valid turn
        image.save(tmp_path / f"p.{kind}", exif=bytes(damaged))
        np.testing.assert_array_equal(ours(tmp_path / f"p.{kind}", 24, 1.0), expected)


def test_exif_rotation_is_honoured_and_arrays_are_taken(tmp_path: Path) -> None:
    image = noise(24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    prepare = Preprocessing(24, 24, "bilinear", MEAN, STD)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(prepare.pixels(tmp_path / "turned.png"), upright)
    np.testing.assert_array_equal(prepare.pixels(upright), upright)
    assert prepare.pixels(upright[:, :, 0]).shape == (24, 24, 3)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"hello")
    prepare = Preprocessing(24, 24, "bilinear", MEAN, STD)
    with pytest.raises(InputError, match=r"p\.png"):
        prepare.pixels(tmp_path / "p.png")
    with pytest.raises(InputError, match=r"none\.png"):
        prepare.pixels(tmp_path / "none.png")
    with pytest.raises(InputError):
        prepare.pixels(np.zeros((3, 4, 5), np.float32))
    with pytest.raises(InputError, match="unknown range"):
        prepare.pixels(np.zeros((30, 30), np.float32))


def test_a_manifest_that_makes_no_sense_is_refused() -> None:
    good = Preprocessing(24, 24, "bilinear", MEAN, STD).to_manifest()
    assert Preprocessing.from_manifest(good).crop_mode == "center"
    for name in good:  # bundle/4 has every field
        with pytest.raises(InputError, match=f"'{name}'"):
            Preprocessing.from_manifest({n: v for n, v in good.items() if n != name})
    for wrong in (
        {"size": 0},
        {"size": 24.0},
        {"resize": 1 << 15},
        {"interpolation": "box"},
        {"std": (0, 1, 1)},
        {"crop_mode": "fit"},
    ):
        with pytest.raises(InputError, match="malformed"):
            Preprocessing.from_manifest(good | wrong)
    with pytest.raises(InputError, match="malformed"):
        Preprocessing.from_manifest({"size": 24})


def test_a_thread_of_pixels_or_nothing_at_all_is_refused() -> None:
    prepare = Preprocessing(224, 224, "bilinear", MEAN, STD)
    for photo in (
        np.zeros((5000, 1), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (1, 60)),
    ):
        with pytest.raises(InputError):
            prepare.pixels(photo)


@pytest.mark.parametrize("side", [55, 71, 83, 95, 97, 107])
def test_no_rounding_cuts_a_row_off(side: int) -> None:
    prepare = Preprocessing(224, 224, "bilinear", MEAN, STD)
    assert (prepare.pixels(np.full((side, side, 3), 255, np.uint8)) == 255).all()

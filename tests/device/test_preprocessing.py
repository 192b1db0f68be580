"""Pillow and numpy on the device give what timm's own evaluation transform gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from sdlora_edge.device.preprocessing import Preprocessing
from sdlora_edge.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("shape", [(64, 64), (97, 50), (33, 120), (20, 21)])
def test_it_is_timms_transform(interpolation: str, crop: float, shape: tuple[int, int]) -> None:
    image = noise(*shape)
    transform = create_transform((3, 48, 48), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop)
    ours = Preprocessing(48, int(48 / crop), interpolation, MEAN, STD)
    np.testing.assert_allclose(ours.normalise(ours.pixels(image)[None])[0], transform(image).numpy(), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = noise(30, 30, mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"p.{suffix}", quality=95)
    ours = Preprocessing(30, 30, "bilinear", MEAN, STD)
    with Image.open(tmp_path / f"p.{suffix}") as opened:
        np.testing.assert_array_equal(ours.pixels(tmp_path / f"p.{suffix}"), np.asarray(opened.convert("RGB")))


def test_exif_rotation_is_honoured_and_arrays_are_taken(tmp_path: Path) -> None:
    image = noise(24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    ours = Preprocessing(24, 24, "bilinear", MEAN, STD)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(ours.pixels(tmp_path / "turned.png"), upright)
    np.testing.assert_array_equal(ours.pixels(upright), upright)
    assert ours.pixels(upright[:, :, 0]).shape == (24, 24, 3)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"hello")
    ours = Preprocessing(24, 24, "bilinear", MEAN, STD)
    with pytest.raises(InputError, match=r"p\.png"):
        ours.pixels(tmp_path / "p.png")
    with pytest.raises(InputError, match=r"none\.png"):
        ours.pixels(tmp_path / "none.png")
    with pytest.raises(InputError):
        ours.pixels(np.zeros((3, 4, 5), np.float32))
    with pytest.raises(InputError, match="malformed"):
        Preprocessing.from_manifest({"size": 0})


def test_a_thread_of_pixels_or_nothing_at_all_is_refused() -> None:
    ours = Preprocessing(224, 224, "bilinear", MEAN, STD)
    for picture in (np.zeros((5000, 1), np.uint8), np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (1, 60))):
        with pytest.raises(InputError):
            ours.pixels(picture)


@pytest.mark.parametrize("side", [55, 71, 83, 95, 97, 107])
def test_no_rounding_cuts_a_row_off(side: int) -> None:
    ours = Preprocessing(224, 224, "bilinear", MEAN, STD)
    assert (ours.pixels(np.full((side, side, 3), 255, np.uint8)) == 255).all()

"""Image files in a real browser: the pixels that a Python device makes of them."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from image_cases import RULES, drawn
from PIL import Image, ImageCms
from selenium import webdriver

pytestmark = pytest.mark.debian
SHAPES = [(320, 240), (427, 640), (97, 50)]
KINDS: list[tuple[str, dict[str, object]]] = [
    ("png", {}),
    ("webp", {"lossless": True}),
    ("gif", {}),
    ("bmp", {}),
    ("jpg", {"quality": 75}),
    ("jpg", {"quality": 95, "subsampling": 0}),
    ("jpg", {"quality": 90, "progressive": True}),
    ("webp", {"quality": 80}),
]
ORIENTATION = 0x0112
PREPARE = """
const [url, cases, done] = arguments;
(async () => {
  const { decode } = await import(`${url}/web/src/decode.js`);
  const { prepare } = await import(`${url}/web/src/image.js`);
  const found = [];
  for (const { file, preprocessing } of cases) {
    const blob = await (await fetch(`${url}/images/${file}`)).blob();
    const { pixels } = prepare(await decode(blob), preprocessing);
    found.push(btoa(Array.from(pixels, (value) => String.fromCharCode(value)).join("")));
  }
  return found;
})().then(done, (error) => done(String(error)));
"""


def exotic_profile() -> bytes:
    """A colour profile in which red and green are exchanged: who obeys it shows other colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def written(folder: Path) -> list[Path]:
    """Fifty files."""
    folder.mkdir()
    for i, (kind, options) in enumerate(KINDS):
        for shape in SHAPES:
            name = f"{i}-{shape[0]}.{kind}"
            Image.fromarray(drawn(*shape)).save(folder / name, **options)
    image = Image.fromarray(drawn(160, 90))
    for turn in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        for kind in ("png", "jpg"):
            image.save(folder / f"turned-{turn}.{kind}", exif=exif)
    for kind in ("png", "jpg"):
        image.convert("L").save(folder / f"grey.{kind}")
        image.save(folder / f"profile.{kind}", icc_profile=exotic_profile())
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png")
    image.convert("1").save(folder / "bits.png")
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(folder / "alpha.png")
    clear.save(folder / "alpha.webp", lossless=True, exact=True)
    clear.convert("LA").save(folder / "alpha-grey.png")
    clear.quantize(64, method=Image.Quantize.FASTOCTREE).save(folder / "alpha-palette.png")
    deep = np.add.outer(np.arange(90) * 700, np.arange(160) * 10).astype(np.uint16)
    Image.fromarray(deep).save(folder / "grey-16.png")
    return sorted(folder.iterdir())


def test_fifty_files_give_the_pixels_of_a_python_device(
    browser: webdriver.Chrome, url: str, site: Path
) -> None:
    files = written(site / "images")
    assert len(files) == 50
    rules = [RULES[i % 4] for i in range(len(files))]
    cases = [{"file": f.name, "preprocessing": r.to_manifest()} for f, r in zip(files, rules)]
    browser.get(f"{url}/images/")
    found = browser.execute_async_script(PREPARE, url, cases)
    assert isinstance(found, list), found
    worst = {}
    for file, rule, packed in zip(files, rules, found):
        pixels = np.frombuffer(base64.b64decode(packed), np.uint8).astype(int)
        worst[file.name] = int(abs(pixels - rule.pixels(file).reshape(-1)).max())
    lossy = {name for name in worst if name.endswith(".jpg") or name.startswith("7-")}
    print(max(worst[name] for name in lossy))
    assert {name: by for name, by in worst.items() if by > (name in lossy)} == {}

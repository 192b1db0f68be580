"""Images as items of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..inputs.image import Preprocessing
from ..inputs.image_files import (
    SUFFIXES,
    open_image,
    reading,
    refuse_unusable,
    suffix_problem,
    upright,
)
from ..inputs.modality import Preparation
from ..inputs.sizes import MAX_PIXELS
from .files import File, Format, files_in
from .folders import labelled
from .items import Item

NOT_READ = "an image format that is not read"
_OTHER_IMAGES = {
    *(
        ".jp2",
        ".j2k",
        ".jxl",
        ".jxr",
        ".eps",
        ".psd",
        ".svg",
        ".tga",
        ".ico",
        ".pcx",
        ".exr",
        ".hdr",
    ),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}


@dataclass(frozen=True)
class ImageFile(Item):
    """One image of a source. max_pixels: one with more is refused before it is decoded."""

    noun: ClassVar[str] = Preprocessing.noun

    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)

    def array(self, prepare: Preparation) -> np.ndarray:
        assert isinstance(prepare, Preprocessing)
        with reading(self.name), self.open() as image:
            return prepare.prepared(image, self.max_pixels)

    def examine(self, decode: bool) -> int:
        with reading(self.name), self.open() as image:
            refuse_unusable(image, self.max_pixels)
            if decode:
                upright(image)
            width, height = image.size
            return int(width * height)

    def limited(self, max_pixels: int) -> ImageFile:
        return replace(self, max_pixels=max_pixels)


def _problem(suffix: str) -> str:
    if suffix not in SUFFIXES:
        return f"{NOT_READ} ({suffix})" if suffix in _OTHER_IMAGES else IMAGES.no_item
    return suffix_problem(suffix)


IMAGES = Format(ImageFile, open_image, _problem)


def images_in(path: Path, domains: bool = False) -> dict[str, list[Item]]:
    """Return the images of a folder or ZIP by split: "train", "test", "val", or "" without one.

    Raises:
        InputError: if there is no such folder or ZIP, or no class in it.
    """
    return labelled(str(path), files_in(path, IMAGES), IMAGES, domains)


def image_files(path: Path, follow: bool = True) -> list[File]:
    """Return the files of a folder or ZIP; those that are no images have a problem.

    follow: Whether links in a folder are followed.

    Raises:
        InputError: if there is no such folder or ZIP.
    """
    return files_in(path, IMAGES, follow)

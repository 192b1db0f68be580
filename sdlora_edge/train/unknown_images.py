"""Images of classes that a run does not know, on which the answer "unknown" is tried."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError
from .images import EMPTY, HIDDEN, NO_IMAGE, ImageFile, counted, files_in, shown

log = logging.getLogger("sdlora_edge")


@dataclass(frozen=True)
class UnknownImages:
    """Images whose class is not known.

    Attributes:
        data: The folder or ZIP they are in.
        images: Those that are used.
        left_out: Folders of known classes; their images are not used.
    """

    data: str
    images: tuple[ImageFile, ...]
    left_out: tuple[str, ...] = ()


def find(data: str, known: Collection[str], max_pixels: int) -> UnknownImages:
    """Find the images of a folder or ZIP, with or without class folders.

    Args:
        data: The folder or ZIP.
        known: Names of the known classes. A folder of such a name is left out, so a dataset whose
            classes are known in part can be given whole.
        max_pixels: An image with more is skipped.

    Raises:
        InputError: There is no image, or all lie in folders of known classes.
    """
    images, left_out, problems = [], set(), []
    for file in files_in(Path(data)):
        if file.problem:
            problems.append(file.problem)
        elif label := next((name for name in _labels(file.path) if name in known), ""):
            left_out.add(label)
        else:
            name = shown(f"{data}/{file.path}")
            images.append(ImageFile(name, "", file.open, max_pixels=max_pixels))
    if odd := [p for p in problems if p not in (HIDDEN, NO_IMAGE, EMPTY)]:
        log.warning("%s: files that are not used: %s", data, counted(odd))
    if not images:
        why = "all its images lie in folders of known classes" if left_out else "it has no image"
        raise InputError(
            f"--unknown {data}: {why}: name a folder with images of classes that the run does not"
            " know"
        )
    return UnknownImages(data, tuple(images), tuple(sorted(left_out)))


def _labels(path: PurePosixPath) -> Iterator[str]:
    """Yield every class that the folders around a file may name (`folders.labelled`)."""
    around = [unicodedata.normalize("NFC", part) for part in path.parts[:-1]]
    for start in range(len(around)):
        for stop in range(start + 1, len(around) + 1):
            yield ".".join(around[start:stop])

"""Images of classes that a run does not know, on which the answer "unknown" is tried."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..inputs.modality import IMAGE, of_kind
from .files import counted, ordinary
from .items import Item
from .kinds import modality

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
    images: tuple[Item, ...]
    left_out: tuple[str, ...] = ()


def find(data: str, known: Collection[str], max_pixels: int, kind: str = IMAGE) -> UnknownImages:
    """Find the images of a folder or ZIP, with or without class folders.

    Args:
        data: The folder or ZIP.
        known: Names of the known classes. A folder of such a name is left out, so a dataset whose
            classes are known in part can be given whole.
        max_pixels: An image with more is skipped.
        kind: Of the items.

    Raises:
        InputError: There is no image, or all lie in folders of known classes.
    """
    images, left_out, problems = [], set(), []
    for labels, item in modality(kind).unlabelled(Path(data)):
        if item.problem:
            problems.append(item.problem)
        elif label := next((name for name in labels if name in known), ""):
            left_out.add(label)
        else:
            images.append(item.limited(max_pixels))
    if odd := [p for p in problems if not ordinary(p)]:
        log.warning("%s: files that are not used: %s", data, counted(odd))
    if not images:
        noun = of_kind(kind).noun
        why = f"all its {noun}s are of known classes" if left_out else f"it has no {noun}"
        raise InputError(
            f"--unknown {data}: {why}: give {noun}s of classes that the run does not know"
        )
    return UnknownImages(data, tuple(images), tuple(sorted(left_out)))

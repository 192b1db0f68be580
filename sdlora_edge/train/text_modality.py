"""Texts, on the host: tables and folders of texts, encoders of `transformers`, ids and mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..inputs.modality import Preparation
from .files import File, files_in
from .items import Item
from .kinds import Modality, Upload, Wanted
from .texts import TEXTS, texts_in, unlabelled_texts

if TYPE_CHECKING:
    import torch
    from torch import nn


class TextModality(Modality):
    """Texts."""

    def read(self, path: Path, domains: bool = False) -> dict[str, list[Item]]:
        return texts_in(path, domains)

    def unlabelled(self, path: Path) -> Iterable[tuple[Iterable[str], Item]]:
        return unlabelled_texts(path)

    def files(self, path: Path, follow: bool = True) -> Sequence[File]:
        return files_in(path, TEXTS, follow)

    def create(self, wanted: Wanted) -> tuple[nn.Module, Preparation | None]:
        from ..method import encoders  # torch, which takes seconds

        if wanted.normalising:
            raise UsageError("mean and std are for images: leave them out")
        return encoders.create(wanted.name, wanted.tokens, wanted.weights, wanted.architecture)

    def upload(self, prepare: Preparation, device: torch.device) -> Upload:
        from .upload import ArrayUpload

        return ArrayUpload(prepare, device)

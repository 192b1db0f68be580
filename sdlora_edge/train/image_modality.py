"""Images, on the host: folders of image files, timm's backbones, and bytes to the accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..inputs.image import Preprocessing
from ..inputs.modality import Preparation
from .files import File
from .folders import unlabelled
from .images import IMAGES, image_files, images_in
from .items import Item
from .kinds import Modality, Upload, Wanted

if TYPE_CHECKING:
    import torch
    from torch import nn


class ImageModality(Modality):
    """Images."""

    def read(self, path: Path, domains: bool = False) -> dict[str, list[Item]]:
        return images_in(path, domains)

    def unlabelled(self, path: Path) -> Iterable[tuple[Iterable[str], Item]]:
        return unlabelled(str(path), image_files(path), IMAGES)

    def files(self, path: Path, follow: bool = True) -> Sequence[File]:
        return image_files(path, follow)

    def create(self, wanted: Wanted) -> tuple[nn.Module, Preparation | None]:
        from ..method import backbones  # torch, which takes seconds

        size = wanted.size or None
        model, prepared = backbones.create(wanted.name, size, wanted.weights, wanted.pretrained)
        return model, Preprocessing(**{**prepared, **wanted.normalising})

    def upload(self, prepare: Preparation, device: torch.device) -> Upload:
        from .upload import PictureUpload

        assert isinstance(prepare, Preprocessing)
        return PictureUpload(prepare, device)

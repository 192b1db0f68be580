"""The host's half of a kind of input: its datasets, its backbones, and its way to the accelerator.

The half that devices need too is `inputs.modality.Preparation`, which names this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..inputs.modality import Preparation, of_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .files import File
    from .items import Item


@dataclass(frozen=True)
class Wanted:
    """A backbone as the settings name it.

    Attributes:
        name: Its name.
        size: Side of an image in pixels; 0 for its own.
        tokens: Of a text at most; 0 for what is usual.
        weights: A file with its weights; None to download them.
        pretrained: Whether it needs weights at all: a run that is opened brings its own.
        normalising: Mean and standard deviation of an image's channels, if not its own.
        architecture: Of a run that is opened: what its backbone said of itself.
    """

    name: str
    size: int = 0
    tokens: int = 0
    weights: Path | None = None
    pretrained: bool = False
    normalising: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    architecture: str = ""


class Upload(Protocol):
    """Items on their way to the model."""

    def __call__(self, items: np.ndarray) -> tuple[Tensor, ...]:
        """Items (N, *shape) of the host to the model's inputs on the device."""

    def arrays(self, items: Tensor) -> tuple[Tensor, ...]:
        """The same of items that are on the device already."""


class Modality(ABC):
    """A kind of input, on the host. It has no state."""

    @abstractmethod
    def read(self, path: Path, domains: bool = False) -> dict[str, list[Item]]:
        """The items of a dataset by split: "train", "test", "val", or "" if it has none.

        Raises:
            InputError: There is no such dataset, or no class in it.
        """

    @abstractmethod
    def unlabelled(self, path: Path) -> Iterable[tuple[Iterable[str], Item]]:
        """Every item of a dataset, with the classes that it may be of; others have a problem.

        Raises:
            InputError: There is no such dataset.
        """

    @abstractmethod
    def files(self, path: Path, follow: bool = True) -> Sequence[File]:
        """The files of a folder or ZIP, each an item or with a problem.

        follow: Whether links in a folder are followed. Raises InputError.
        """

    @abstractmethod
    def create(self, wanted: Wanted) -> tuple[nn.Module, Preparation | None]:
        """Build a backbone without head, in eval mode, and what it reads.

        A backbone that cannot be built by its name alone has an attribute `architecture`. With it,
        there need be no `Preparation`: the run has its own.

        Raises:
            UsageError: The name is unknown, or the model does not take this size.
            InputError: The weights do not fit, or cannot be downloaded.
        """

    @abstractmethod
    def upload(self, prepare: Preparation, device: torch.device) -> Upload:
        """The way to a device. On a CPU it gives the same bits as `Preparation.arrays`."""


def modality(kind: str) -> Modality:
    """The host's half of a kind. Raises InputError if there is none here."""
    module, name = of_kind(kind).host.split(":")
    found: Modality = getattr(import_module(module), name)()
    return found

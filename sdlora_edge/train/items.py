"""What is learned from: the items of a dataset, whatever their kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..inputs.modality import Preparation

Opener = Callable[[], Any]


@dataclass(frozen=True)
class Item(ABC):
    """One image, text, ... of a source.

    Attributes:
        noun: What one is called in messages.
        name: For messages.
        label: Its class.
        open: Opens it.
        domain: "" if the dataset has no domains.
        problem: Why it is not used, in a few words by which such items are counted; "" if it is.
        detail: The problem in full.
        nested: True if it lies in a folder inside its class folder.
    """

    noun: ClassVar[str] = "item"

    name: str
    label: str
    open: Opener
    domain: str = ""
    problem: str = ""
    detail: str = ""
    nested: bool = field(default=False, kw_only=True)

    @abstractmethod
    def array(self, prepare: Preparation) -> np.ndarray:
        """An array of `prepare.shape`. Raises InputError if it cannot be read."""

    @abstractmethod
    def examine(self, decode: bool) -> int:
        """Look at it, or read all of it (`decode`), and return what that costs, in pixels.

        Raises:
            InputError: It cannot be read.
        """

    def limited(self, max_pixels: int) -> Item:
        """The same with another bound on its size, if it has one."""
        return self

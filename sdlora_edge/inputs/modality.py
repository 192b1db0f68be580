"""The seam: all that other modules need to know of a kind of input, so that none asks which it is.

A raw item (an image, a text) is first made into one array of a fixed shape: an item that is small
enough to be kept, stacked and mixed. `arrays` makes what the model reads of a batch of them. Host
and device use the same `Preparation`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..errors import InputError, UsageError
from ..shortage import verdict

GROUP = "sdlora_edge.modalities"
IMAGE, TEXT = "image", "text"
BUILT_IN = {IMAGE: "image:Preprocessing", TEXT: "text:Tokenization"}
"""{kind: module here, and class}"""


class Tensor(NamedTuple):
    """Raw items as the Open Inference Protocol sends them.

    Attributes:
        name: Of the input.
        datatype: UINT8, or BYTES for texts.
        shape: -1 stands for any number. The first is that of the items.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


KIND = "kind"
"""The manifest's field. Images have none: they came first."""
MICRO_TEXT = "micro_bert"
"""a text encoder with random weights, for tests and first tries"""
Inputs = Mapping[str, np.ndarray]
"""What a model reads: arrays by the names of its inputs, each (N, ...)."""


class Preparation(ABC):
    """How raw items of one kind become what a model reads.

    The contract for kinds of other packages, which name their class by an entry point:

    [project.entry-points."sdlora_edge.modalities"]
    mykind = "mypackage.windows:Windows"

    Attributes:
        kind: Its name in manifests.
        noun: What one item is called in messages.
        suffix: Of the files that `kept` makes.
        tensor: Raw items in the Open Inference Protocol.
        spatial: Whether an item is a picture, uint8 (size, size, 3): training turns and crops it.
        defaults: Settings of a run whose default differs for this kind.
        host: Module and name of its `train.kinds.Modality`: what the workstation needs.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    host: ClassVar[str]
    suffix: ClassVar[str] = ".bin"
    tensor: ClassVar[Tensor] = Tensor("items", "BYTES", (-1,))
    spatial: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of an item."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of an item."""

    @property
    def described(self) -> str:
        """What the model reads, in a few words."""
        return f"{self.noun}s, {self.dtype} {self.shape}"

    @property
    def tokens(self) -> float:
        """What an item costs a transformer at most: an image of 224 pixels has 196 patches."""
        return self.shape[0]

    @abstractmethod
    def item(self, raw: Any, limit: int | None = None) -> np.ndarray:
        """An array of `shape` and `dtype`.

        Args:
            raw: What a user hands over.
            limit: How large it may be, in the kind's own unit. None: as large as is usual.

        Raises:
            TypeError: It is nothing that this kind reads.
            InputError: It cannot be read, or is too large; the message names it.
        """

    def decoded(self, raw: Any) -> int:
        """Number of pixels that `item` decodes at a time: what it takes of the memory.

        Raises InputError if it cannot be read.
        """
        return 0

    def many(self, value: Any) -> tuple[Iterable[Any], bool]:
        """The raw items in a value, and whether the value is itself one.

        Raises:
            TypeError: It is neither an item nor an iterable.
        """
        array = isinstance(value, np.ndarray) and value.shape == self.shape
        single = isinstance(value, (str, bytes, Path)) or array
        return ([value], True) if single else (iter(value), False)

    @staticmethod
    def kept(raw: Any, change: Callable[[Any], Any] | None = None) -> bytes:
        """A raw item as the content of a file that a person can look at, and train on.

        Args:
            raw: What `item` takes.
            change: A hook of the user, which hides what must not be kept.

        Raises:
            InputError: It cannot be read.
            UsageError: `change` returned something else than it was given, or this kind is not
                kept.
        """
        raise UsageError("inputs of this kind are not kept: leave --keep-unknown out")

    @staticmethod
    def preview(path: Path) -> tuple[str, bytes]:
        """A file of `kept`, or of a dataset, for a web page: (media type, content).

        Raises InputError if it cannot be read.
        """
        return "text/plain", path.name.encode()

    def named(self, argument: str) -> Iterator[tuple[str, Any]]:
        """The raw items that a command's argument stands for, each with its name.

        Raises InputError if there is none.
        """
        yield argument, Path(argument)

    def streamed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """The raw items of a file or of standard input, each with its name."""
        yield "-", data

    @abstractmethod
    def arrays(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """What the model reads. items: (N, *shape)."""

    @property
    @abstractmethod
    def axes(self) -> Mapping[str, Sequence[str]]:
        """Names of the first axes of each of the model's inputs, which have any length."""

    def canary(self, seed: int, count: int) -> dict[str, np.ndarray]:
        """Inputs that are drawn from a seed, equal on every machine."""
        return self.arrays(self._drawn(seed, count))

    def _drawn(self, seed: int, count: int) -> np.ndarray:
        """Items of bytes, or of numbers from 0 to 1."""
        data = np.frombuffer(drawn(seed, count * math.prod(self.shape)), np.uint8)
        items = data.reshape(count, *self.shape).astype(self.dtype)
        return items / self.dtype.type(255) if self.dtype.kind == "f" else items

    def seen(self, item: np.ndarray) -> np.ndarray | str:
        """An item as the model sees it, for a person: uint8 (H, W, 3), or a text."""
        return f"{self.noun} {item.shape}"

    def samples(self, count: int) -> list[Any]:
        """Raw items to try a device with, always the same."""
        return list(self._drawn(0, count))

    def views(self, items: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Another view of every item, (N, *shape): here its beginning, and the end of another.

        Views need not look real: they stand where items of other classes might. By how they move,
        the host knows how the features of old classes move (`train.task`).
        """
        found, length = items.copy(), self.shape[0]
        for own, other in zip(found, random.permutation(len(items)), strict=True):
            cut = random.randint(length // 4, 3 * length // 4 + 1)
            own[cut:] = items[other][cut:]
        return found

    @abstractmethod
    def blank(self, each: int, seed: int) -> dict[str, np.ndarray]:
        """Items that say nothing, {what they are: (each, *shape)}: no known class is like them."""

    @abstractmethod
    def to_manifest(self) -> dict[str, Any]:
        """JSON with integers only. It holds KIND, unless this is an image."""

    @classmethod
    @abstractmethod
    def from_manifest(cls, value: Mapping[str, Any], folder: Path) -> Preparation:
        """The inverse of `to_manifest`.

        Args:
            value: What it returned.
            folder: Where `files` lie.

        Raises:
            InputError: A field is missing, unknown or out of bounds.
        """

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files, by name, that belong to it in a run and in a bundle."""
        return {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of a run that it fixes."""
        return {}

    def stacked(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Any number of items as one array (N, *shape)."""
        return np.stack(items) if len(items) else np.zeros((0, *self.shape), self.dtype)


def kind_of(backbone: str) -> str:
    """The kind that a backbone reads, by its name.

    A name with a slash is a folder, or a model of the Hugging Face hub: a text encoder. Any kind
    of another package is named before a colon.
    """
    kind, colon, _ = backbone.partition(":")
    if colon and kind.isidentifier() and kind not in BUILT_IN:
        return kind
    return TEXT if "/" in backbone or backbone == MICRO_TEXT else IMAGE


def preparation(value: Mapping[str, Any], folder: Path) -> Preparation:
    """What a manifest's `preprocessing` describes.

    Args:
        value: The manifest's field.
        folder: Of the bundle or run, whose files were verified.

    Raises:
        InputError: There is no such kind here, or a field is wrong.
    """
    return of_kind(kind_in(value)).from_manifest(value, folder)


def kind_in(value: Mapping[str, Any]) -> str:
    """The kind that a manifest's `preprocessing` is of."""
    return str(value.get(KIND, IMAGE))


def of_kind(kind: str) -> type[Preparation]:
    """The class of a kind. Raises InputError if there is none here."""
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if kind in BUILT_IN:
        module, name = BUILT_IN[kind].split(":")
        found: type[Preparation] = getattr(import_module(f".{module}", __package__), name)
        return found
    if kind not in others:
        raise InputError(
            f"inputs of kind {kind!r} are not known here: this program reads "
            f"{', '.join(sorted({*BUILT_IN, *others}))}; install the package of that kind"
        )
    try:
        return others[kind].load()  # type: ignore[no-any-return]
    except Exception as error:  # whatever another package does when it is imported
        raise verdict(
            error, InputError(f"inputs of kind {kind!r} cannot be loaded: {error}")
        ) from error


def drawn(seed: int, count: int) -> bytes:
    """Bytes for a canary, equal on every machine."""
    return hashlib.shake_256(b"sdlora-edge canary %d" % seed).digest(count)


def rows(inputs: Inputs, chosen: slice | np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of every array."""
    return {name: array[chosen] for name, array in inputs.items()}


def parts(inputs: Inputs, size: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a batch in order, `size` at a time."""
    return (rows(inputs, slice(i, i + size)) for i in range(0, count(inputs), size))


def joined(batches: Sequence[Inputs]) -> dict[str, np.ndarray]:
    """Batches one after the other. Their arrays are as long as the longest, filled with zeros."""
    found = {}
    for name in batches[0]:
        own = [batch[name] for batch in batches]
        longest = np.max([array.shape[1:] for array in own], axis=0, initial=0)
        found[name] = np.concatenate([filled(array, longest) for array in own])
    return found


def filled(array: np.ndarray, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """An array with zeros after its end, so that its axes after the first have these sizes."""
    more = [(0, int(to - own)) for to, own in zip(sizes, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *more]) if any(end for _, end in more) else array


def count(inputs: Inputs) -> int:
    """How many items a batch holds."""
    return len(next(iter(inputs.values())))

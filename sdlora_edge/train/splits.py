"""What each task learns: a source is opened and cut into tasks, and its images are decoded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import TypeVar, Union

import numpy as np
from PIL import Image

from ..errors import InputError, UsageError
from ..formats.canonical import sha256
from ..formats.packet import name_problem
from ..inputs.modality import IMAGE, Preparation, kind_of, of_kind
from . import datasets
from .images import ImageFile
from .items import Item
from .kinds import modality
from .settings import DIGITS, Settings
from .source import ByClass, SeedSplit, Source, source_of

log = logging.getLogger("sdlora_edge")


@dataclass(frozen=True)
class Part:
    """What one task learns.

    Attributes:
        name: Of the task.
        classes: Those that have training images.
        train: Training images by class.
        test: Test images by class.
        source: Name of the source.
        domains: Those that the images come from, if the task is one of domains.
    """

    name: str
    classes: tuple[str, ...]
    train: ByClass
    test: ByClass
    source: str
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images that were decoded once.

    Attributes:
        pixels: uint8 (N, size, size, 3).
        targets: int64 (N,), indices into the classes that the images were read for.
    """

    pixels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        """Yield uint8 (n, size, size, 3) for each array of n indices."""
        return (self.pixels[batch] for batch in batches)

    def subset(self, rows: np.ndarray) -> Decoded:
        """Some of the images. rows: int (n,)."""
        return Decoded(self.pixels[rows], self.targets[rows])


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images that are too many to keep: worker processes decode one whenever it is asked for."""

    images: Sequence[Item]
    targets: np.ndarray
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index].array(self.prepare)

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        """Yield uint8 (n, size, size, 3) for each array of n indices."""
        from torch.utils.data import DataLoader

        loader: DataLoader[np.ndarray] = DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=workers,
            collate_fn=np.stack,
        )
        return iter(loader)

    def subset(self, rows: np.ndarray) -> Streamed:
        """Some of the images. rows: int (n,)."""
        return Streamed([self.images[row] for row in rows], self.targets[rows], self.prepare)


Images = Union[Decoded, Streamed]
T = TypeVar("T")


def load(
    data: str, split: SeedSplit, root: str = "", domains: bool = False, kind: str = IMAGE
) -> Source:
    """Open a source.

    `folders.labelled` says how folders become classes and, with `domains`, domains. A named dataset
    knows its own domains. Without train/ and test/, the seed splits each class of each domain.

    Args:
        data: "digits", a dataset's name (`datasets.NAMES`), or a folder or ZIP with a folder per
            class. A folder that is called like a dataset is written ./name.
        split: How the seed splits.
        root: Folder that holds the named datasets.
        domains: True if the outermost folders are domains.
        kind: Of its items.

    Raises:
        InputError: if there is no such thing, or no class in it.
    """
    named = data == DIGITS or data in datasets.NAMES
    held = datasets.SETS[data].kind if data in datasets.SETS else IMAGE
    if named and held != kind:
        raise UsageError(
            f"{data} holds {of_kind(held).noun}s, and the backbone reads {of_kind(kind).noun}s: "
            "give other data"
        )
    if data == DIGITS:
        return source_of(DIGITS, {"": _digits()}, split)
    if data in datasets.NAMES:
        return datasets.load(data, Path(root), split)
    return source_of(str(Path(data).resolve()), modality(kind).read(Path(data), domains), split)


def load_for(settings: Settings, data: str | None = None) -> Source:
    """Open the source of a run, or another one (`data`) as the run's settings say."""
    wanted = settings.data
    own = data is None or wanted.data in (data, str(Path(data).resolve()))
    source = load(
        wanted.data if data is None else data,
        SeedSplit(wanted.test_fraction, settings.training.seed),
        wanted.data_root,
        domains=own and wanted.protocol == "domain",
        kind=kind_of(settings.backbone.backbone),
    )
    if source.val and not any(source.test.values()) and not wanted.validate:
        log.info("%s has val/ but no test/: val/ is used for testing", source.name)
        source = replace(source, test={c: source.val.get(c, []) for c in source.classes}, val={})
    return source.changed(lambda item: item.limited(wanted.max_megapixels * 10**6))


def task_classes(classes: Sequence[str], base: int, tasks: int, seed: int) -> list[list[str]]:
    """Split classes into those of the base session (if there is one) and of each task.

    The seed shuffles their order, with numpy's RandomState: so seed 1993 gives the order that is
    customary in the literature.

    Raises:
        UsageError: if a task would get fewer than two classes. The loss is a cross-entropy over the
            task's own classes.
    """
    if len(classes) < 2:
        raise UsageError(
            f"there is only one class ({', '.join(classes)}): add another,"
            " since a task learns the difference between classes"
        )
    order = [classes[i] for i in np.random.RandomState(seed).permutation(len(classes))]
    rest = order[base:]
    if base == 1 or len(rest) < 2 * tasks:
        raise UsageError(
            f"{len(classes)} classes are too few for {tasks} tasks of at least two"
            + (
                f" after a base of {base}: give fewer --tasks or --base-classes"
                if base
                else ": give fewer --tasks"
            )
        )
    cuts = np.array_split(np.arange(len(rest)), tasks)
    return ([order[:base]] if base else []) + [[rest[i] for i in cut] for cut in cuts]


def parts(source: Source, settings: Settings) -> list[Part]:
    """Cut a source into the base session (if there is one) and the tasks of a run.

    Raises:
        UsageError: if the classes or domains are too few.
    """
    wanted = settings.data
    if wanted.protocol == "domain":
        return _domain_parts(source, settings)
    cut = task_classes(source.classes, wanted.base_classes, wanted.tasks, settings.training.seed)
    first = 0 if wanted.base_classes else 1
    return [
        _part(source, f"task {i}", classes, (), settings) for i, classes in enumerate(cut, first)
    ]


def _domain_parts(source: Source, settings: Settings) -> list[Part]:
    tasks = settings.data.tasks
    if settings.data.base_classes:
        raise UsageError(
            "protocol domain has no base session: choose a backbone that has pre-trained weights"
        )
    if len(source.domains) < tasks:
        raise UsageError(
            f"{source.name} has {len(source.domains)} domain(s), too few for {tasks} tasks:"
            f" put the {source.noun}s into <domain>/<class>/ for --protocol domain, or give fewer"
            " --tasks"
        )
    groups = [
        tuple(source.domains[i] for i in cut)
        for cut in np.array_split(np.arange(len(source.domains)), tasks)
    ]
    names = ["+".join(group) for group in groups]
    if problem := next((found for name in names if (found := name_problem(name))), None):
        raise UsageError(f"the name of a task, made of its domains, {problem}: give more --tasks")
    return [
        _part(source, name, source.classes, group, settings)
        for name, group in zip(names, groups, strict=True)
    ]


def part(
    source: Source, name: str, classes: Sequence[str], domains: Sequence[str], settings: Settings
) -> Part | None:
    """Return what a task of these classes has learned; None if the source no longer has them."""
    if not set(classes) <= set(source.classes) or not set(domains) <= set(source.domains):
        return None
    return _part(source, name, classes, tuple(domains), settings)


def _part(
    source: Source,
    name: str,
    classes: Sequence[str],
    domains: tuple[str, ...],
    settings: Settings,
) -> Part:
    def chosen(images: ByClass) -> dict[str, list[Item]]:
        return {
            c: [p for p in images.get(c, []) if not domains or p.domain in domains] for c in classes
        }

    train, test = chosen(source.train), chosen(source.test)
    validate, seed = settings.data.validate, settings.training.seed
    if validate and source.val:
        test = chosen(source.val)
    elif validate:
        train, test = SeedSplit(validate, seed).of(p for own in train.values() for p in own)
    if settings.data.train_limit:
        train = _limited(train, domains, settings.data.train_limit, seed)
    learned = tuple(c for c in classes if train.get(c))  # a domain may lack a class
    return Part(name, learned, train, {c: test.get(c, []) for c in learned}, source.name, domains)


def _limited(
    images: ByClass, domains: tuple[str, ...], limit: int, seed: int
) -> dict[str, list[Item]]:
    """Return at most `limit` images of each class, or of each class in each domain."""
    random = np.random.RandomState(seed)
    kept: dict[str, list[Item]] = {}
    for label, of_class in images.items():
        kept[label] = []
        for domain in domains or ("",):
            own = [p for p in of_class if not domains or p.domain == domain]
            kept[label] += [own[i] for i in sorted(random.permutation(len(own))[:limit])]
    return kept


def trained_on(part: Part) -> str:
    """Return a digest of the names of a task's training images."""
    names = sorted(
        f"{label}/{PurePath(p.name).name}" for label, own in part.train.items() for p in own
    )
    return sha256("\n".join(names).encode())


def read(
    images: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    prepare: Preparation,
    cache_gb: float,
    need: bool = True,
) -> Images:
    """Read the images of `classes`: decode them once if they fit into `cache_gb`, else when asked.

    Raises:
        InputError: if `need` and a class has no readable image. If images are decoded when asked,
            an image counts as readable if its header is; a damaged one raises later.
    """
    count = sum(len(images[c]) for c in classes)
    if count * math.prod(prepare.shape) * prepare.dtype.itemsize <= cache_gb * 2**30:
        return decode(images, classes, prepare, need)
    found: list[Item] = []
    targets: list[int] = []
    for index, label in enumerate(classes):
        own = [p for p in images[label] if _read(p, _examine) is not None]
        _refuse_none(prepare.noun, label, need and not own)
        found += own
        targets += [index] * len(own)
    return Streamed(found, np.array(targets, np.int64), prepare)


def _examine(image: Item) -> int:
    return image.examine(decode=False)


def decode(
    images: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    prepare: Preparation,
    need: bool,
) -> Decoded:
    """Decode the images of `classes` once.

    A warning names each unreadable image, unless a check has named it; it is skipped.

    Raises:
        InputError: if `need` and a class has no readable image.
    """
    pixels: list[np.ndarray] = []
    targets: list[int] = []
    for index, label in enumerate(classes):
        read = (_read(p, lambda item: item.array(prepare)) for p in images[label])
        own = [p for p in read if p is not None]
        _refuse_none(prepare.noun, label, need and not own)
        pixels += own
        targets += [index] * len(own)
    return Decoded(prepare.stacked(pixels), np.array(targets, np.int64))


def _read(image: Item, how: Callable[[Item], T]) -> T | None:
    """Return None for an image that cannot be read; warn if nothing has named it before."""
    if image.problem:
        return None
    try:
        return how(image)
    except InputError as error:
        log.warning("%s; it is skipped", error)
        return None


def _refuse_none(noun: str, label: str, none: bool) -> None:
    if none:
        raise InputError(
            f"class {label!r} has no readable training {noun}: repair its files or remove its"
            " folder"
        )


def _digits() -> list[Item]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        ImageFile(
            f"digit {i}",
            str(target),
            partial(Image.fromarray, np.uint8(np.minimum(pixels * 16, 255))),
        )
        for i, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True))
    ]

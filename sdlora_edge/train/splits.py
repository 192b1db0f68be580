"""Where images come from (class folders, a ZIP of them, a named dataset, or scikit-learn's digits), and how they are cut into
tasks or domains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Literal, TypeVar, Union

import numpy as np
from PIL import Image

from ..errors import InputError, UsageError
from ..formats.canonical import sha256
from ..formats.packet import name_problem
from ..inputs.image import Preprocessing
from .folders import labelled
from .images import ImageFile, files_in
from .settings import DIGITS, Settings

log = logging.getLogger("sdlora_edge")


@dataclass(frozen=True)
class Source:
    """Training and test images by class; the keys of both are `classes`, sorted.

    name: "digits", a dataset's name, or the resolved path. domains: in the order they are learned; empty if the dataset has
    none. val: images for `validate`, if they lie apart. skipped: files that are not used, each with its `problem`. is_split: the
    dataset says itself which image is for what; else the seed does.
    """

    name: str
    train: Mapping[str, Sequence[ImageFile]]
    test: Mapping[str, Sequence[ImageFile]]
    domains: tuple[str, ...] = ()
    val: Mapping[str, Sequence[ImageFile]] = field(default_factory=dict)
    skipped: tuple[ImageFile, ...] = ()
    is_split: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train)

    def changed(self, change: Callable[[ImageFile], ImageFile]) -> Source:
        """The same source with every image of its classes changed."""

        def every(side: Mapping[str, Sequence[ImageFile]]) -> dict[str, list[ImageFile]]:
            return {label: [change(p) for p in own] for label, own in side.items()}

        return replace(self, train=every(self.train), test=every(self.test), val=every(self.val))


@dataclass(frozen=True)
class Part:
    """What one task learns: its name, classes, images by class; `domains` names those it is cut from, if any."""

    name: str
    classes: tuple[str, ...]
    train: Mapping[str, Sequence[ImageFile]]
    test: Mapping[str, Sequence[ImageFile]]
    source: str
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images decoded once. pixels: uint8 (N, size, size, 3); targets: int64 (N,), indices into the classes they were read for."""

    pixels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        """uint8 (n, size, size, 3) for each array of n indices."""
        return (self.pixels[batch] for batch in batches)


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images too many to keep: each is decoded whenever it is asked for, by worker processes."""

    images: Sequence[ImageFile]
    targets: np.ndarray
    prepare: Preprocessing

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index].pixels(self.prepare)

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        from torch.utils.data import DataLoader

        sampler = [batch.tolist() for batch in batches]
        loader = DataLoader(self, batch_sampler=sampler, num_workers=workers, collate_fn=np.stack)  # type: ignore[arg-type, var-annotated]
        return iter(loader)


Images = Union[Decoded, Streamed]
T = TypeVar("T")


def load(
    data: str, test_fraction: float, seed: int, root: str = "", domains: bool = False
) -> Source:
    """Open a source: "digits", a named set below `root` (`datasets.NAMES`), or a folder or ZIP with a folder per class (and
    train/ and test/ around them, if present).

    How folders become classes and, with `domains`, domains: see `folders.labelled`. Named datasets know their own domains.
    Without train/ and test/, each class of each domain is split by the seed. A folder named like a dataset is meant by ./name.
    Raises InputError if there is no such thing, or no class in it.
    """
    from . import datasets  # it builds on this module

    if data == DIGITS:
        return source_of(DIGITS, {"": _digits()}, test_fraction, seed)
    if data in datasets.NAMES:
        return datasets.load(data, Path(root), test_fraction, seed)
    return source_of(str(Path(data).resolve()), images_in(Path(data), domains), test_fraction, seed)


def images_in(path: Path, domains: bool = False) -> dict[str, list[ImageFile]]:
    """The images of a folder or ZIP by split ("train", "test" and "val", or "" if they are not split). Raises InputError."""
    return labelled(str(path), files_in(path), domains)


def source_of(
    name: str,
    by_split: Mapping[str, Sequence[ImageFile]],
    test_fraction: float,
    seed: int,
    domains: Sequence[str] = (),
) -> Source:
    """The source of images by split, cut by the seed if "" is the only one. domains: their order; default: sorted.

    Raises InputError if train/ is missing, or a class has no training images.
    """
    everything = [image for images in by_split.values() for image in images]
    skipped = tuple(image for image in everything if image.problem)
    domains = tuple(domains) or tuple(sorted({image.domain for image in everything} - {""}))
    used = {split: [p for p in images if not p.problem] for split, images in by_split.items()}
    sides = {split: _grouped(images, "label") for split, images in used.items() if images}
    if set(sides) <= {""}:
        return Source(
            name, *_split(used.get("", []), test_fraction, seed), domains, skipped=skipped
        )
    if "" in sides or "train" not in sides:
        raise InputError(
            f"{name}: train/ and test/ must stand beside each other, with a folder per class in each"
        )
    for side in ("test", "val"):
        if extra := set(sides.get(side, ())) - set(sides["train"]):
            raise InputError(
                f"{name}: {side}/ has classes that train/ has not: {', '.join(sorted(extra)[:5])}"
            )
    train, test = sides["train"], sides.get("test", {})
    return Source(
        name,
        train,
        {c: test.get(c, []) for c in train},
        domains,
        sides.get("val", {}),
        skipped,
        is_split=True,
    )


def task_classes(classes: Sequence[str], base: int, tasks: int, seed: int) -> list[list[str]]:
    """The classes of the base session (if any) and of each task, in an order shuffled by the seed.

    numpy's RandomState, so that seed 1993 gives the order customary in the literature. Raises UsageError where a task
    would get fewer than two classes: the loss is a cross-entropy over the task's own classes.
    """
    if len(classes) < 2:
        raise UsageError(
            f"there is one class only ({', '.join(classes)}): at least two are needed to learn a difference"
        )
    order = [classes[i] for i in np.random.RandomState(seed).permutation(len(classes))]
    rest = order[base:]
    if base == 1 or len(rest) < 2 * tasks:
        raise UsageError(
            f"{len(classes)} classes are too few for {tasks} tasks of at least two"
            + (
                f" after a base of {base}: fewer --tasks or --base-classes"
                if base
                else ": fewer --tasks"
            )
        )
    cuts = np.array_split(np.arange(len(rest)), tasks)
    return ([order[:base]] if base else []) + [[rest[i] for i in cut] for cut in cuts]


def load_for(settings: Settings, data: str | None = None) -> Source:
    """The source of a run, or another one (`data`) read by the run's settings."""
    own = data is None or settings.data.data in (data, str(Path(data).resolve()))
    source = load(
        settings.data.data if data is None else data,
        settings.data.test_fraction,
        settings.training.seed,
        settings.data.data_root,
        domains=own and settings.data.protocol == "domain",
    )
    if source.val and not any(source.test.values()) and not settings.data.validate:
        log.info("%s has val/ but no test/: the images of val/ are used for testing", source.name)
        source = replace(source, test={c: source.val.get(c, []) for c in source.classes}, val={})
    return source.changed(
        lambda image: replace(image, max_pixels=settings.data.max_megapixels * 10**6)
    )


def parts(source: Source, settings: Settings) -> list[Part]:
    """The base session (if any) and the tasks of a stream, by the protocol. Raises UsageError where they cannot be cut."""
    if settings.data.protocol == "class":
        cut = task_classes(
            source.classes, settings.data.base_classes, settings.data.tasks, settings.training.seed
        )
        first = 0 if settings.data.base_classes else 1
        return [
            _part(source, f"task {i}", classes, (), settings)
            for i, classes in enumerate(cut, first)
        ]
    if settings.data.base_classes:
        raise UsageError(
            "protocol domain has no base session: give a backbone with pre-trained weights"
        )
    if len(source.domains) < settings.data.tasks:
        raise UsageError(
            f"{source.name} has {len(source.domains)} domain(s), too few for {settings.data.tasks} tasks: images lie in "
            "<domain>/<class>/ for --protocol domain"
        )
    groups = [
        tuple(source.domains[i] for i in cut)
        for cut in np.array_split(np.arange(len(source.domains)), settings.data.tasks)
    ]
    names = ["+".join(group) for group in groups]
    if problem := next((found for name in names if (found := name_problem(name))), None):
        raise UsageError(f"a task named after its domains {problem}: cut them into more --tasks")
    return [
        _part(source, name, source.classes, group, settings)
        for name, group in zip(names, groups, strict=True)
    ]


def _part(
    source: Source,
    name: str,
    classes: Sequence[str],
    domains: tuple[str, ...],
    settings: Settings,
) -> Part:
    def chosen(images: Mapping[str, Sequence[ImageFile]]) -> dict[str, list[ImageFile]]:
        return {
            c: [p for p in images.get(c, []) if not domains or p.domain in domains] for c in classes
        }

    train, test = chosen(source.train), chosen(source.test)
    if settings.data.validate and source.val:
        test = chosen(source.val)
    elif settings.data.validate:
        train, test = _split(
            (p for own in train.values() for p in own),
            settings.data.validate,
            settings.training.seed,
        )
    if settings.data.train_limit:
        random = np.random.RandomState(settings.training.seed)
        for label, images in train.items():
            by_domain = [
                [p for p in images if not domains or p.domain == domain]
                for domain in domains or ("",)
            ]
            train[label] = [
                own[i]
                for own in by_domain
                for i in sorted(random.permutation(len(own))[: settings.data.train_limit])
            ]
    learned = tuple(c for c in classes if train.get(c))  # a domain need not have every class
    return Part(name, learned, train, {c: test.get(c, []) for c in learned}, source.name, domains)


def trained_on(part: Part) -> str:
    """A digest of the names of a task's training images."""
    names = sorted(
        f"{label}/{PurePath(p.name).name}" for label, own in part.train.items() for p in own
    )
    return sha256("\n".join(names).encode())


def part(
    source: Source, name: str, classes: Sequence[str], domains: Sequence[str], settings: Settings
) -> Part | None:
    """What a task of these classes learned from, once more; None where the source no longer has them."""
    if not set(classes) <= set(source.classes) or not set(domains) <= set(source.domains):
        return None
    return _part(source, name, classes, tuple(domains), settings)


def read(
    images: Mapping[str, Sequence[ImageFile]],
    classes: Sequence[str],
    prepare: Preprocessing,
    cache_gb: float,
    need: bool = True,
) -> Images:
    """The images of `classes`: decoded once where they fit into `cache_gb`, else decoded whenever they are asked for.

    Raises InputError where `need` and a class has no readable image. (When streamed, an image counts as readable if its header is;
    one that turns out damaged later raises InputError then.)
    """
    count = sum(len(images[c]) for c in classes)
    if count * prepare.size**2 * 3 <= cache_gb * 2**30:
        return decode(images, classes, prepare, need)
    found: list[ImageFile] = []
    targets: list[int] = []
    for index, label in enumerate(classes):
        own = [
            p
            for p in images[label]
            if _read(p, lambda image: image.examine(decode=False)) is not None
        ]
        _refuse_none(label, need and not own)
        found += own
        targets += [index] * len(own)
    return Streamed(found, np.array(targets, np.int64), prepare)


def decode(
    images: Mapping[str, Sequence[ImageFile]],
    classes: Sequence[str],
    prepare: Preprocessing,
    need: bool,
) -> Decoded:
    """Decode the images of `classes` once. Unreadable ones are named and skipped with a warning, unless a check has done so.

    Raises InputError if `need` and a class has no readable image.
    """
    pixels: list[np.ndarray] = []
    targets: list[int] = []
    for index, label in enumerate(classes):
        own = [
            p
            for p in (_read(p, lambda image: image.pixels(prepare)) for p in images[label])
            if p is not None
        ]
        _refuse_none(label, need and not own)
        pixels += own
        targets += [index] * len(own)
    empty = np.zeros((0, prepare.size, prepare.size, 3), np.uint8)
    return Decoded(np.stack(pixels) if pixels else empty, np.array(targets, np.int64))


def _read(image: ImageFile, how: Callable[[ImageFile], T]) -> T | None:
    """None for an image that cannot be read, with a warning if nothing has named it before."""
    if image.problem:
        return None
    try:
        return how(image)
    except InputError as error:
        log.warning("%s; it is skipped", error)
        return None


def _refuse_none(label: str, none: bool) -> None:
    if none:
        raise InputError(
            f"class {label!r} has no readable training image: repair its files or remove its folder"
        )


def _digits() -> list[ImageFile]:
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


def _grouped(
    images: Iterable[ImageFile], attribute: Literal["label", "domain"]
) -> dict[str, list[ImageFile]]:
    found: dict[str, list[ImageFile]] = {}
    for image in images:
        found.setdefault(getattr(image, attribute), []).append(image)
    return dict(sorted(found.items()))


def _split(
    images: Iterable[ImageFile], test_fraction: float, seed: int
) -> tuple[dict[str, list[ImageFile]], dict[str, list[ImageFile]]]:
    """Each class of each domain cut by the seed; at least one image on each side where there are two."""
    train: dict[str, list[ImageFile]] = {}
    test: dict[str, list[ImageFile]] = {}
    random = np.random.RandomState(seed)
    for label, of_class in _grouped(images, "label").items():
        train[label], test[label] = [], []
        for items in _grouped(of_class, "domain").values():
            order = random.permutation(len(items))
            count = min(max(1, round(len(items) * test_fraction)), len(items) - 1)
            test[label] += [items[i] for i in sorted(order[:count])]
            train[label] += [items[i] for i in sorted(order[count:])]
    return train, test

"""Where pictures come from (class folders, a ZIP of them, a named set, or scikit-learn's digits), and how they are cut into
tasks or domains."""

from __future__ import annotations

import io
import logging
import os
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, Union

import numpy as np
from PIL import Image

from ..device.preprocessing import Preprocessing
from ..errors import InputError, UsageError
from ..packet import name_problem
from .config import DIGITS, TrainConfig

log = logging.getLogger("sdlora_edge")
UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError, InputError)
"""what opening or decoding one picture may raise"""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


@dataclass(frozen=True)
class Picture:
    """One picture of a source: its name for messages, its class, how to open it, and its domain where the set has domains."""

    name: str
    label: str
    open: Callable[[], Image.Image]
    domain: str = ""


@dataclass(frozen=True)
class Source:
    """Training and test pictures by class; the keys of both are `classes`, sorted.

    name: "digits", a set's name, or the resolved path. domains: in the order they are learned; empty where the set has none.
    """

    name: str
    train: Mapping[str, Sequence[Picture]]
    test: Mapping[str, Sequence[Picture]]
    domains: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train)


@dataclass(frozen=True)
class Part:
    """What one task learns: its name, classes, pictures by class; `domains` names those it is cut from, if any."""

    name: str
    classes: tuple[str, ...]
    train: Mapping[str, Sequence[Picture]]
    test: Mapping[str, Sequence[Picture]]
    source: str
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pictures decoded once. pixels: uint8 (N, size, size, 3); targets: int64 (N,), indices into the classes they were read for."""

    pixels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        """uint8 (n, size, size, 3) for each array of n indices."""
        return (self.pixels[batch] for batch in batches)


@dataclass(frozen=True, eq=False)
class Streamed:
    """Pictures too many to keep: each is decoded whenever it is asked for, by worker processes."""

    pictures: Sequence[Picture]
    targets: np.ndarray
    prepare: Preprocessing

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            with self.pictures[index].open() as image:
                return self.prepare.pixels(image)
        except UNREADABLE as error:
            raise InputError(f"{self.pictures[index].name} cannot be read: {error}") from None

    def batches(self, batches: Sequence[np.ndarray], workers: int = 0) -> Iterator[np.ndarray]:
        from torch.utils.data import DataLoader

        sampler = [batch.tolist() for batch in batches]
        loader = DataLoader(self, batch_sampler=sampler, num_workers=workers, collate_fn=np.stack)  # type: ignore[arg-type, var-annotated]
        return iter(loader)


Pictures = Union[Decoded, Streamed]


def load(data: str, test_fraction: float, seed: int, root: str = "", domains: bool = False) -> Source:
    """Open a source: "digits", a named set below `root` (`datasets.NAMES`), or a folder or ZIP with a folder per class (and
    train/ and test/ around them, if present).

    A class is a folder that holds pictures; deeper folders are joined with dots. With `domains`, the outermost of them is the
    domain instead: domain/class/pictures. Named sets know their own domains. Without train/ and test/, each class of each
    domain is split by the seed. A folder named like a set is meant by ./name. Raises InputError where there is no such thing,
    or no class in it.
    """
    from . import datasets  # it builds on this module

    if data == DIGITS:
        return source_of(DIGITS, {"": _digits()}, test_fraction, seed)
    if data in datasets.NAMES:
        return datasets.load(data, Path(root), test_fraction, seed)
    return source_of(str(Path(data).resolve()), pictures_in(Path(data), domains), test_fraction, seed)


def pictures_in(path: Path, domains: bool = False) -> dict[str, list[Picture]]:
    """The pictures of a folder or ZIP by split ("train" and "test", or "" where they are not split). Raises InputError."""
    return _labelled(str(path), files_in(path), domains)


def files_in(path: Path) -> dict[PurePosixPath, Callable[[], Image.Image]]:
    """How to open each picture file of a folder or ZIP, by its path inside, sorted. Raises InputError where it is neither."""
    if path.is_dir():
        found = _folder(path)
    elif zipfile.is_zipfile(path):
        found = _zip(path)
    elif path.exists():
        raise InputError(f"{path} is neither a folder nor a ZIP file of pictures")
    else:
        raise InputError(f"{path}: no such folder or ZIP file, and no named set either")
    return {
        inside: open_
        for inside, open_ in found.items()
        if inside.suffix.lower() in SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in inside.parts)
    }


def source_of(
    name: str, by_split: Mapping[str, Sequence[Picture]], test_fraction: float, seed: int, domains: Sequence[str] = ()
) -> Source:
    """The source of pictures by split, cut by the seed where "" is the only one. domains: their order; default: sorted.

    Raises InputError where train/ is missing, or a class has no training pictures.
    """
    found = {picture.domain for pictures in by_split.values() for picture in pictures} - {""}
    domains = tuple(domains) or tuple(sorted(found))
    if set(by_split) == {""}:
        return Source(name, *_split(by_split[""], test_fraction, seed), domains)
    if "" in by_split or "train" not in by_split:
        raise InputError(f"{name}: train/ and test/ must stand beside each other, with a folder per class in each")
    train, test = _grouped(by_split["train"], "label"), _grouped(by_split.get("test", []), "label")
    if extra := set(test) - set(train):
        raise InputError(f"{name}: test/ has classes that train/ has not: {', '.join(sorted(extra)[:5])}")
    return Source(name, train, {label: test.get(label, []) for label in train}, domains)


def task_classes(classes: Sequence[str], base: int, tasks: int, seed: int) -> list[list[str]]:
    """The classes of the base session (if any) and of each task, in an order shuffled by the seed.

    numpy's RandomState, so that seed 1993 gives the order customary in the literature. Raises UsageError where a task
    would get fewer than two classes: the loss is a cross-entropy over the task's own classes.
    """
    if len(classes) < 2:
        raise UsageError(f"there is one class only ({', '.join(classes)}): at least two are needed to learn a difference")
    order = [classes[i] for i in np.random.RandomState(seed).permutation(len(classes))]
    rest = order[base:]
    if base == 1 or len(rest) < 2 * tasks:
        raise UsageError(
            f"{len(classes)} classes are too few for {tasks} tasks of at least two"
            + (f" after a base of {base}: fewer --tasks or --base-classes" if base else ": fewer --tasks")
        )
    cuts = np.array_split(np.arange(len(rest)), tasks)
    return ([order[:base]] if base else []) + [[rest[i] for i in cut] for cut in cuts]


def load_for(settings: TrainConfig, data: str | None = None) -> Source:
    """The source of a run, or another one (`data`) read by the run's settings."""
    own = data is None or settings.data in (data, str(Path(data).resolve()))
    return load(
        settings.data if data is None else data,
        settings.test_fraction,
        settings.seed,
        settings.data_root,
        domains=own and settings.protocol == "domain",
    )


def parts(source: Source, settings: TrainConfig) -> list[Part]:
    """The base session (if any) and the tasks of a stream, by the protocol. Raises UsageError where they cannot be cut."""
    if settings.protocol == "class":
        cut = task_classes(source.classes, settings.base_classes, settings.tasks, settings.seed)
        first = 0 if settings.base_classes else 1
        return [_part(source, f"task {i}", classes, (), settings) for i, classes in enumerate(cut, first)]
    if settings.base_classes:
        raise UsageError("protocol domain has no base session: give a backbone with pre-trained weights")
    if len(source.domains) < settings.tasks:
        raise UsageError(
            f"{source.name} has {len(source.domains)} domain(s), too few for {settings.tasks} tasks: pictures lie in "
            "<domain>/<class>/ for --protocol domain"
        )
    groups = [tuple(source.domains[i] for i in cut) for cut in np.array_split(np.arange(len(source.domains)), settings.tasks)]
    names = ["+".join(group) for group in groups]
    if problem := next((found for name in names if (found := name_problem(name))), None):
        raise UsageError(f"a task named after its domains {problem}: cut them into more --tasks")
    return [_part(source, name, source.classes, group, settings) for name, group in zip(names, groups, strict=True)]


def _part(source: Source, name: str, classes: Sequence[str], domains: tuple[str, ...], settings: TrainConfig) -> Part:
    def chosen(pictures: Mapping[str, Sequence[Picture]]) -> dict[str, list[Picture]]:
        return {c: [p for p in pictures[c] if not domains or p.domain in domains] for c in classes}

    train, test = chosen(source.train), chosen(source.test)
    if settings.validate:
        train, test = _split((p for own in train.values() for p in own), settings.validate, settings.seed)
    if settings.train_limit:
        random = np.random.RandomState(settings.seed)
        for label, pictures in train.items():
            by_domain = [[p for p in pictures if not domains or p.domain == domain] for domain in domains or ("",)]
            train[label] = [own[i] for own in by_domain for i in sorted(random.permutation(len(own))[: settings.train_limit])]
    learned = tuple(c for c in classes if train.get(c))  # a domain need not have every class
    return Part(name, learned, train, {c: test.get(c, []) for c in learned}, source.name, domains)


def part(source: Source, name: str, classes: Sequence[str], domains: Sequence[str], settings: TrainConfig) -> Part | None:
    """What a task of these classes learned from, once more; None where the source no longer has them."""
    if not set(classes) <= set(source.classes) or not set(domains) <= set(source.domains):
        return None
    return _part(source, name, classes, tuple(domains), settings)


def read(
    pictures: Mapping[str, Sequence[Picture]], classes: Sequence[str], prepare: Preprocessing, cache_gb: float, need: bool = True
) -> Pictures:
    """The pictures of `classes`: decoded once where they fit into `cache_gb`, else decoded whenever they are asked for.

    Raises InputError where `need` and a class has no readable picture. (When streamed, a picture counts as readable if its header is;
    one that turns out damaged later raises InputError then.)
    """
    count = sum(len(pictures[c]) for c in classes)
    if count * prepare.size**2 * 3 <= cache_gb * 2**30:
        return decode(pictures, classes, prepare, need)
    found: list[Picture] = []
    targets: list[int] = []
    for index, label in enumerate(classes):
        own = [p for p in pictures[label] if _opens(p)]
        if need and not own:
            raise InputError(f"class {label!r} has no readable training picture: mend its files or remove its folder")
        found += own
        targets += [index] * len(own)
    return Streamed(found, np.array(targets, np.int64), prepare)


def _opens(picture: Picture) -> bool:
    try:
        picture.open().close()
    except UNREADABLE as error:
        log.warning("%s is skipped: %s", picture.name, error)
        return False
    return True


def decode(pictures: Mapping[str, Sequence[Picture]], classes: Sequence[str], prepare: Preprocessing, need: bool) -> Decoded:
    """Decode the pictures of `classes` once. Unreadable ones are named, counted and skipped with a warning.

    Raises InputError where `need` and a class has no readable picture.
    """
    pixels, targets, skipped = [], [], 0
    for index, label in enumerate(classes):
        readable = 0
        for picture in pictures[label]:
            try:
                with picture.open() as image:
                    pixels.append(prepare.pixels(image))
            except UNREADABLE as error:
                skipped += 1
                log.warning("%s is skipped: %s", picture.name, error)
                continue
            targets.append(index)
            readable += 1
        if need and not readable:
            raise InputError(f"class {label!r} has no readable training picture: mend its files or remove its folder")
    if skipped:
        log.warning("%d unreadable picture(s) skipped, %d read", skipped, len(pixels))
    empty = np.zeros((0, prepare.size, prepare.size, 3), np.uint8)
    return Decoded(np.stack(pixels) if pixels else empty, np.array(targets, np.int64))


def _digits() -> list[Picture]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return [
        Picture(f"digit {i}", str(target), partial(Image.fromarray, np.uint8(np.minimum(pixels * 16, 255))))
        for i, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True))
    ]


def _folder(path: Path) -> dict[PurePosixPath, Callable[[], Image.Image]]:
    names = (os.path.join(folder, name) for folder, _, files in os.walk(path, followlinks=True) for name in files)
    return {PurePosixPath(Path(name).relative_to(path).as_posix()): partial(Image.open, name) for name in sorted(names)}


def _zip(path: Path) -> dict[PurePosixPath, Callable[[], Image.Image]]:
    archives = {os.getpid(): zipfile.ZipFile(path)}  # workers that share one would read from each other's places in it

    def opener(member: str) -> Image.Image:
        if (process := os.getpid()) not in archives:
            archives[process] = zipfile.ZipFile(path)
        return Image.open(io.BytesIO(archives[process].read(member)))

    names = archives[os.getpid()].namelist()
    return {PurePosixPath(name): partial(opener, name) for name in sorted(names) if not name.endswith("/")}


def _labelled(data: str, pictures: Mapping[PurePosixPath, Callable[[], Image.Image]], domains: bool) -> dict[str, list[Picture]]:
    """Pictures by split ("" where there is none), each labelled by its folders below what all have in common.

    With `domains`, the outermost of those folders is the picture's domain, and the rest its label.
    """
    if loose := [path for path in pictures if len(path.parts) == 1]:
        log.warning("%s: %d picture(s) outside any class folder are not used", data, len(loose))
    paths = [path for path in pictures if len(path.parts) > 1]
    if not paths:
        raise InputError(f"{data} has no class folders with pictures: put each class's pictures into a folder of its name")
    strip, depth = 0, min(len(path.parts) for path in paths) - 2 - domains
    while strip < depth and len({path.parts[strip] for path in paths}) == 1 and paths[0].parts[strip] not in SPLITS:
        strip += 1
    split = all(path.parts[strip] in SPLITS and len(path.parts) > strip + 2 for path in paths)
    by_split: dict[str, list[Picture]] = {}
    folders: dict[tuple[str, str], tuple[str, ...]] = {}
    for path in paths:
        parts = path.parts[strip + split : -1]
        if domains and len(parts) < 2:
            raise InputError(f"{data} is not laid out as domain/class/pictures: {path} has no class folder in a domain folder")
        domain, label = (unicodedata.normalize("NFC", ".".join(p)) for p in (parts[:domains], parts[domains:]))
        if problem := name_problem(label) or (domains and name_problem(domain)):
            raise InputError(f"{data}: class folder {'/'.join(parts)!r} {problem}: rename it")
        if folders.setdefault((domain, label), parts) != parts:
            raise InputError(f"{data}: the folders {'/'.join(parts)} and {'/'.join(folders[domain, label])} make one class name")
        picture = Picture(f"{data}/{path}", label, pictures[path], domain)
        by_split.setdefault(SPLITS[path.parts[strip]] if split else "", []).append(picture)
    return by_split


def _grouped(pictures: Iterable[Picture], attribute: Literal["label", "domain"]) -> dict[str, list[Picture]]:
    found: dict[str, list[Picture]] = {}
    for picture in pictures:
        found.setdefault(getattr(picture, attribute), []).append(picture)
    return dict(sorted(found.items()))


def _split(
    pictures: Iterable[Picture], test_fraction: float, seed: int
) -> tuple[dict[str, list[Picture]], dict[str, list[Picture]]]:
    """Each class of each domain cut by the seed; at least one picture on each side where there are two."""
    train: dict[str, list[Picture]] = {}
    test: dict[str, list[Picture]] = {}
    random = np.random.RandomState(seed)
    for label, of_class in _grouped(pictures, "label").items():
        train[label], test[label] = [], []
        for items in _grouped(of_class, "domain").values():
            order = random.permutation(len(items))
            count = min(max(1, round(len(items) * test_fraction)), len(items) - 1)
            test[label] += [items[i] for i in sorted(order[:count])]
            train[label] += [items[i] for i in sorted(order[count:])]
    return train, test

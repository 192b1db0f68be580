"""A source of items: those of each class, for training and for testing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..errors import InputError
from .items import Item

ByClass = Mapping[str, Sequence[Item]]


@dataclass(frozen=True)
class Source:
    """Training and test images by class.

    Attributes:
        name: "digits", a dataset's name, or the resolved path of a folder or ZIP.
        train: Its keys are the classes, sorted.
        test: The same keys; a class may have no image.
        domains: In the order in which they are learned; empty if there are none.
        val: Images for the setting `validate`, if they have a folder of their own.
        skipped: Files that are not used; `problem` of each says why.
        is_split: True if the dataset itself splits training and test images; else the seed does.
    """

    name: str
    train: ByClass
    test: ByClass
    domains: tuple[str, ...] = ()
    val: ByClass = field(default_factory=dict)
    skipped: tuple[Item, ...] = ()
    is_split: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.train)

    @property
    def noun(self) -> str:
        """What one of its items is called in messages."""
        return _noun(p for side in (self.train, self.test) for own in side.values() for p in own)

    def changed(self, change: Callable[[Item], Item]) -> Source:
        """Return this source with `change` applied to every image of its classes."""

        def every(side: ByClass) -> dict[str, list[Item]]:
            return {label: [change(p) for p in own] for label, own in side.items()}

        return replace(self, train=every(self.train), test=every(self.test), val=every(self.val))


@dataclass(frozen=True)
class SeedSplit:
    """How images are split if the dataset has no split of its own."""

    test_fraction: float
    seed: int

    def of(self, images: Iterable[Item]) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
        """Split each class of each domain into (training, test) images by class.

        Both sides get at least one image of a class that has two.
        """
        train: dict[str, list[Item]] = {}
        test: dict[str, list[Item]] = {}
        random = np.random.RandomState(self.seed)
        for label, of_class in _grouped(images, "label").items():
            train[label], test[label] = [], []
            for items in _grouped(of_class, "domain").values():
                order = random.permutation(len(items))
                count = min(max(1, round(len(items) * self.test_fraction)), len(items) - 1)
                test[label] += [items[i] for i in sorted(order[:count])]
                train[label] += [items[i] for i in sorted(order[count:])]
        return train, test


def source_of(
    name: str,
    by_split: ByClass,
    split: SeedSplit,
    domains: Sequence[str] = (),
) -> Source:
    """Make a source of images by split.

    Args:
        name: Of the source.
        by_split: Images under "train", "test" and "val", or all under "".
        split: Used for the images under "".
        domains: In the order in which they are learned; default: sorted.

    Raises:
        InputError: if there are test images without training images.
    """
    everything = [image for images in by_split.values() for image in images]
    skipped = tuple(image for image in everything if image.problem)
    domains = tuple(domains) or tuple(sorted({image.domain for image in everything} - {""}))
    used = {side: [p for p in images if not p.problem] for side, images in by_split.items()}
    sides = {side: _grouped(images, "label") for side, images in used.items() if images}
    if set(sides) <= {""}:
        return Source(name, *split.of(used.get("", [])), domains, skipped=skipped)
    _refuse_uneven(name, sides)
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


def _refuse_uneven(name: str, sides: Mapping[str, ByClass]) -> None:
    """Raise InputError unless every class has training images."""
    noun = _noun(p for own in sides.values() for items in own.values() for p in items)
    if "" in sides or "train" not in sides:
        raise InputError(
            f"{name} has test {noun}s and no train/ beside them: put train/ and test/ side by side,"
            " with a folder per class in each"
        )
    for side in ("test", "val"):
        if extra := set(sides.get(side, ())) - set(sides["train"]):
            raise InputError(
                f"{name}: {side}/ has classes that train/ lacks: {', '.join(sorted(extra)[:5])};"
                f" add training {noun}s of them, or remove them from {side}/"
            )


def _noun(items: Iterable[Item]) -> str:
    return next((item.noun for item in items), Item.noun)


def _grouped(
    images: Iterable[Item], attribute: Literal["label", "domain"]
) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for image in images:
        found.setdefault(getattr(image, attribute), []).append(image)
    return dict(sorted(found.items()))

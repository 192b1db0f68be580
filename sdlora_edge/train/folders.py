"""How folders become classes: splits and domains around them, folders inside them."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..formats.packet import name_problem
from .files import EMPTY, NOT_UNICODE, File, Format, counted, not_unicode, shown
from .items import Item

log = logging.getLogger("sdlora_edge")
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip
"""Folders around classes that hold a split, in upper or lower case."""
OUTSIDE = "outside any class folder"
_Parts = tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    """How the folders of a source are to be read.

    Attributes:
        data: The source, for messages.
        format: Of its files.
        common: Number of folders that all items lie in.
        split: True if folders such as train/ lie around the classes.
        domains: True if folders of domains lie around the classes.
        holders: The folders that hold items themselves.
        above: The folders around them.
        named: {(domain, class): class folder}, filled by `names`.
    """

    data: str
    format: Format
    common: int
    split: bool
    domains: bool
    holders: frozenset[_Parts]
    above: frozenset[_Parts]
    named: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """Index of the part of a path that begins the name of the class."""
        return self.common + self.split + self.domains

    def class_folder(self, around: _Parts) -> _Parts:
        """Return the outermost folder around a file that holds items; () if none does."""
        return next(
            (
                around[:n]
                for n in range(self.start + 1, len(around) + 1)
                if around[:n] in self.holders
            ),
            (),
        )

    def split_of(self, path: PurePosixPath) -> str:
        return _split_of("".join(path.parts[self.common : self.common + 1])) if self.split else ""

    def names(self, folder: _Parts) -> tuple[str, str]:
        """Return (domain, class) of a class folder.

        Raises:
            InputError: if no packet could carry the name, or two folders make the same one.
        """
        domain, label = (
            unicodedata.normalize("NFC", ".".join(parts))
            for parts in (folder[self.start - self.domains : self.start], folder[self.start :])
        )
        name = "/".join(folder[self.common + self.split :])
        if (
            problem := NOT_UNICODE
            if not_unicode(name)
            else name_problem(label) or (domain and name_problem(domain))
        ):
            raise InputError(f"{self.data}: class folder {name!r}: {problem}: rename it")
        if (other := self.named.setdefault((domain, label), name)) != name:
            raise InputError(
                f"{self.data}: the folders {name} and {other} make one class name:"
                " rename one of them"
            )
        return domain, label


def labelled(
    data: str, files: Sequence[File], format: Format, domains: bool
) -> dict[str, list[Item]]:
    """Return the items by split ("" if there is none), labelled by their class folders.

    A class is the outermost folder that holds items. Its name is the path of that folder joined
    with dots, without the folders that all items share. With `domains`, the outermost folder is
    the domain instead. Items with a `problem` are not used.

    Raises:
        InputError: if the folders make no classes.
    """
    inner = [file.path for file in files if not file.problem and len(file.path.parts) > 1]
    if not inner:
        why = counted(file.problem or OUTSIDE for file in files)
        raise InputError(
            f"{data} has no class folders with {format.noun}s{why and f' ({why})'}:"
            f" put the {format.noun}s of each class into a folder with its name"
        )
    common = _common(inner, domains)
    _refuse_ambiguous(data, inner, common, format.noun)
    holders = frozenset(path.parts[:-1] for path in inner)
    above = frozenset(holder[:n] for holder in holders for n in range(len(holder)))
    layout = _Layout(data, format, common, _is_split(data, inner, common), domains, holders, above)
    by_split: dict[str, list[Item]] = {}
    for file in files:
        by_split.setdefault("" if file.problem else layout.split_of(file.path), []).append(
            _item(layout, file)
        )
    return by_split


def unlabelled(
    data: str, files: Sequence[File], format: Format
) -> Iterator[tuple[Iterator[str], Item]]:
    """Yield every item, and every class that the folders around it may name (`labelled`)."""
    for file in files:
        name = shown(f"{data}/{file.path}")
        yield _labels(file.path), format.make(name, "", file.open, problem=file.problem)


def _labels(path: PurePosixPath) -> Iterator[str]:
    """Yield every class that the folders around a file may name (`labelled`)."""
    around = [unicodedata.normalize("NFC", part) for part in path.parts[:-1]]
    for start in range(len(around)):
        for stop in range(start + 1, len(around) + 1):
            yield ".".join(around[start:stop])


def _item(layout: _Layout, file: File) -> Item:
    name = shown(f"{layout.data}/{file.path}")
    around = file.path.parts if file.problem == EMPTY else file.path.parts[:-1]
    folder = layout.class_folder(around)
    if not file.problem and folder:
        domain, label = layout.names(folder)
        return layout.format.make(name, label, file.open, domain, nested=folder != around)
    if not file.problem and layout.domains and len(around) == layout.start:
        raise InputError(
            f"{layout.data} is not laid out as <domain>/<class>/: {file.path} lies in no class"
            " folder of a domain folder; move it into one"
        )
    label = (
        ""
        if around in layout.above and not folder
        else shown(".".join((folder or around)[layout.start :]))
    )
    return layout.format.make(name, label, file.open, problem=file.problem or OUTSIDE)


def _split_of(folder: str) -> str:
    return SPLITS.get(folder.casefold(), "")


def _common(paths: Sequence[PurePosixPath], domains: bool) -> int:
    """Return how many folders all items lie in, not counting a split, a domain or a class."""

    def shared(common: int) -> bool:
        return len({path.parts[common] for path in paths}) == 1 and not _split_of(
            paths[0].parts[common]
        )

    common, depth = 0, min(len(path.parts) for path in paths) - 2 - domains
    while common < depth and shared(common):
        common += 1
    # one more if splits lie inside it: a folder with splits is no class, even beside items
    return common + (shared(common) and bool(_splits(paths, common + 1)))


def _refuse_ambiguous(data: str, paths: Sequence[PurePosixPath], common: int, noun: str) -> None:
    """Raise InputError if a single class lies deep inside: the folder above may name the class."""
    if common and len({path.parts[:-1] for path in paths}) == 1 and Path(data).is_dir():
        raise InputError(
            f"{data}: all {noun}s lie in {'/'.join(paths[0].parts[:-1])}, and it is not certain"
            " which folder names the class: move them into one folder with the name of the class"
        )
    if common:
        log.info(
            "%s: all %ss lie in %s/, which is not part of the class names",
            data,
            noun,
            "/".join(paths[0].parts[:common]),
        )


def _splits(paths: Sequence[PurePosixPath], common: int) -> set[str]:
    """Return the folders of this depth that hold a split: class folders lie in them."""
    return {
        path.parts[common]
        for path in paths
        if len(path.parts) > common + 2 and _split_of(path.parts[common])
    }


def _is_split(data: str, paths: Sequence[PurePosixPath], common: int) -> bool:
    """Return whether folders such as train/ and test/ lie around the class folders.

    Raises:
        InputError: if other folders lie beside them.
    """
    splits = _splits(paths, common)
    folders = {path.parts[common] for path in paths if len(path.parts) > common + 1}
    if splits and (others := [folder for folder in folders if not _split_of(folder)]):
        raise InputError(
            f"{data}: {min(others)!r} lies beside {min(splits)!r}, which holds a split:"
            " move it into a split or elsewhere"
        )
    return bool(splits)

"""The files of a folder or ZIP: which are items, how to open each, why others are not used."""

from __future__ import annotations

import functools
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError, printable
from ..inputs.image_files import reading, refuse_large_file
from ..inputs.sizes import MAX_FILE
from .items import Item, Opener

_NO_ITEM = "not a"
HIDDEN, EMPTY, NOT_UNICODE, LINK = "hidden", "an empty folder", "its name is not UTF-8", "a link"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of compression. Python reads others too, some of them without a bound on memory."""


@dataclass(frozen=True)
class Format:
    """Which files are items, and how they are opened.

    Attributes:
        make: The class of its items.
        open: Opens a file, by its name or its bytes.
        problem: Why a file with this suffix (in lower case) is not used; "" if it is.
    """

    make: type[Item]
    open: Callable[[str | io.BytesIO], Any]
    problem: Callable[[str], str]

    @property
    def noun(self) -> str:
        return self.make.noun

    @property
    def no_item(self) -> str:
        """The problem of files that are something else."""
        return f"{_NO_ITEM}{'n' if self.noun[0] in 'aeio' else ''} {self.noun}"


@dataclass(frozen=True)
class File:
    """A file of a folder or ZIP, or an empty folder.

    Attributes:
        path: Inside the folder or ZIP.
        open: Opens it as an item.
        problem: Why it is not used; "" if it is.
    """

    path: PurePosixPath
    open: Opener
    problem: str = ""


@dataclass(frozen=True)
class Member:
    """Opens one file of a ZIP, in any process."""

    archive: str
    name: str
    open: Callable[[str | io.BytesIO], Any]

    def __call__(self) -> Any:
        found = os.stat(self.archive)
        archive = _archive(self.archive, os.getpid(), found.st_mtime_ns, found.st_size)
        size = archive.getinfo(self.name).file_size
        refuse_large_file(size)
        with archive.open(self.name) as file:
            # `size` bounds what is decompressed, whatever the file declares
            return self.open(io.BytesIO(file.read(size)))


@functools.lru_cache(maxsize=8)
def _archive(path: str, process: int, *version: int) -> zipfile.ZipFile:
    """One for each process: processes that share one would move each other's position in it."""
    return zipfile.ZipFile(path)


def ordinary(problem: str) -> bool:
    """Return whether files with this problem lie in many folders, and are no reason to warn."""
    return problem in (HIDDEN, EMPTY) or problem.startswith(_NO_ITEM)


def shown(name: str) -> str:
    """Return a file's name on one line, without anything that a terminal would obey."""
    return printable(name).replace("\n", "\\n")


def counted(problems: Iterable[str]) -> str:
    """Count the problems, the most frequent first: "not an image: 3, hidden: 1"."""
    return ", ".join(f"{problem}: {count}" for problem, count in Counter(problems).most_common())


def files_in(path: Path, format: Format, follow: bool = True) -> list[File]:
    """Return every file and every empty folder of a folder or ZIP, sorted.

    follow: Whether links in a folder are followed.

    Raises:
        InputError: if `path` is neither, or cannot be read.
    """
    if path.is_dir():
        found = {file.path: file for file in _folder(path, format, follow)}
    elif path.is_file() and zipfile.is_zipfile(path):
        with reading(shown(str(path)), "a ZIP file"):
            found = {file.path: file for file in _zip(path, format)}
    elif path.exists():
        raise InputError(
            f"{path} is neither a folder nor a ZIP file: name one that holds {format.noun}s"
        )
    else:
        raise InputError(f"{path}: no such folder, ZIP file or named dataset: check the path")
    return [found[inside] for inside in sorted(found, key=str)]


def _folder(path: Path, format: Format, follow: bool) -> Iterator[File]:
    failed: list[OSError] = []
    for folder, folders, names in os.walk(path, followlinks=follow, onerror=failed.append):
        inside = PurePosixPath(Path(folder).relative_to(path).as_posix())
        kept = []
        for name in folders:
            refused = not follow and os.path.islink(os.path.join(folder, name))
            problem = LINK if refused else _folder_problem(path, folder, name)
            if problem:
                yield _unused(inside / name, problem)
            else:
                kept.append(name)
        if not folders and not names and folder != str(path):
            yield _unused(inside, EMPTY)
        folders[:] = kept
        for name in names:
            full = os.path.join(folder, name)
            problem = LINK if not follow and os.path.islink(full) else _problem(name, format)
            yield File(inside / name, partial(format.open, full), problem)
    for error in failed:
        inside = PurePosixPath(Path(error.filename).relative_to(path).as_posix())
        yield _unused(inside, f"cannot be listed ({error.strerror})")


def _folder_problem(root: Path, folder: str, name: str) -> str:
    if _hidden(name):
        return HIDDEN
    if os.path.islink(full := os.path.join(folder, name)):
        above = [Path(folder), *(p for p in Path(folder).parents if p == root or root in p.parents)]
        if os.path.realpath(full) in {os.path.realpath(p) for p in above}:
            return "a link to a folder that it lies in"
    return ""


def _zip(path: Path, format: Format) -> Iterator[File]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    paths = [PurePosixPath(info.filename.replace("\\", "/").lstrip("/")) for info in members]
    filled = {parent for inside in paths for parent in inside.parents}
    for info, inside in zip(members, paths, strict=True):
        hidden = [i for i, part in enumerate(inside.parts, 1) if _hidden(part)]
        if hidden:
            yield _unused(PurePosixPath(*inside.parts[: hidden[0]]), HIDDEN)
        elif not info.filename.endswith(("/", "\\")):
            yield File(
                inside,
                Member(str(path), info.filename, format.open),
                _problem(inside.name, format) or _member_problem(info),
            )
        elif inside not in filled and inside.parts:
            yield _unused(inside, EMPTY)


def _unused(inside: PurePosixPath, problem: str) -> File:
    return File(inside, _closed, problem)


def _closed() -> None:
    """In place of an opener, where there is nothing to open."""


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _problem(name: str, format: Format) -> str:
    """Return why a file of this name is not used; "" if its suffix is that of an item."""
    if _hidden(name):
        return HIDDEN
    if problem := format.problem(PurePosixPath(name).suffix.lower()):
        return problem
    return NOT_UNICODE if not_unicode(name) else ""


def not_unicode(name: str) -> bool:
    """Return whether a file's name holds bytes that Python could not decode."""
    return any("\ud800" <= character <= "\udfff" for character in name)


def _member_problem(info: zipfile.ZipInfo) -> str:
    if info.flag_bits & 1:
        return "encrypted"
    if info.compress_type not in _METHODS:
        return f"compressed by method {info.compress_type}, not by deflate"
    return f"larger than {MAX_FILE} bytes" if info.file_size > MAX_FILE else ""

"""A disk that can lose its power: every state it may be in afterwards, at every point of what a program did to it.

`Simulator` takes the place of `sdlora_edge.storage.disk`. It does what is asked on the real file
system, and keeps beside it what a disk has been promised to keep. Nothing is assumed of a disk but
what `disk` says in its first lines; so, when the power goes,

    a name      holds anything that it has held since its folder was last synced, whatever other names hold: a rename may be
                half done, a later one may be there and an earlier one not
    a file      that is not synced has any of its pieces, the others are zeros, or what lay there before; or it ends early

and all mixtures of these. A write is four points: the file is made, is half written, is written, is
synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdlora_edge.storage import disk

PIECES = 4
STALE = b"\xa5"
"""what lay on a part of the disk before"""
MIXTURES = 100_000
"""more at one point are a mistake in the scenario: nothing is sampled, so it must be made
smaller"""
REAL = {
    name: getattr(disk, name)
    for name in (
        "read",
        "size",
        "names",
        "write",
        "sync",
        "rename",
        "link",
        "unlink",
        "mkdir",
        "rmdir",
        "share",
        "lock",
    )
}


class Killed(BaseException):
    """The process is gone: nothing it does after this reaches the disk."""


@dataclass(frozen=True)
class Content:
    """The bytes of a file, compared by their digest."""

    data: bytes = field(compare=False)
    digest: str

    @classmethod
    def of(cls, data: bytes) -> Content:
        return cls(data, hashlib.sha256(data).hexdigest())


Tree = dict[str, "Content | None"]
"""{path: its content, None for a folder}: what a disk may hold"""


@dataclass(eq=False)
class File:
    data: bytes = b""
    """what every process sees"""
    kept: bytes = b""
    """what was last synced"""
    outcomes: list[Content] = field(default_factory=list)
    """what a cut may leave of it; empty where that is not worked out yet"""

    def trees(self) -> list[Tree]:
        self.outcomes = self.outcomes or [Content.of(data) for data in torn(self.kept, self.data)]
        return [{"": content} for content in self.outcomes]


@dataclass(eq=False)
class Folder:
    names: dict[str, list[File | Folder | None]] = field(default_factory=dict)
    """what each name has held since the last sync, the newest last; None is nothing"""

    def trees(self) -> list[Tree]:
        each = []
        for name, held in self.names.items():
            options: list[Tree] = []
            for node in dict.fromkeys(held):
                options += [{}] if node is None else [_under(name, tree) for tree in node.trees()]
            each.append(options)
        count = 1
        for options in each:
            count *= len(options)
        assert count <= MIXTURES, f"{count} mixtures at one point"
        found: list[Tree] = []
        for mixture in itertools.product(*each):
            tree: Tree = {"": None}
            for part in mixture:
                tree.update(part)
            found.append(tree)
        return found


def _under(name: str, tree: Tree) -> Tree:
    return {f"{name}/{path}" if path else name: content for path, content in tree.items()}


def torn(kept: bytes, data: bytes) -> list[bytes]:
    """What a cut may leave of a file that held `kept` when it was synced, and `data` now."""
    if kept == data:
        return [data]
    length = max(1, -(-len(data) // PIECES))
    starts = range(0, len(data), length)
    found = [kept, data, data[:-1], *(data[:start] for start in starts)]
    for arrived in itertools.product((True, False), repeat=len(starts)):
        for other in (b"\0", STALE):
            before = kept[: len(data)] + other * (len(data) - len(kept))
            parts = zip(arrived, starts, strict=True)
            found.append(
                b"".join((data if new else before)[start : start + length] for new, start in parts)
            )
    return list(dict.fromkeys(found))


class Simulator:
    """Records all that is done below `root`.

    After every operation `at_point` is called, with the states a cut then leaves.

    die_at: the process is killed instead of its n-th operation, counted from 1.
    """

    def __init__(self, root: Path, at_point: Callable[[list[Tree]], None], die_at: int = 0) -> None:
        self.root, self.at_point, self.die_at = root, at_point, die_at
        self.points = self.operations = 0
        self.top = _load(root)

    @contextlib.contextmanager
    def installed(self) -> Iterator[pytest.MonkeyPatch]:
        """In the place of `disk`, for as long as the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            for name in (
                "write",
                "sync",
                "rename",
                "link",
                "unlink",
                "mkdir",
                "rmdir",
                "share",
                "lock",
            ):
                patch.setattr(disk, name, getattr(self, name))
            yield patch

    def point(self) -> None:
        self.points += 1
        self.at_point(self.top.trees())

    def _operate(self) -> None:
        """Before every operation: a dead process does nothing."""
        self.operations += 1
        if self.die_at and self.operations >= self.die_at:
            raise Killed

    def write(
        self,
        path: Path,
        chunks: Iterable[bytes],
        mode: int = 0o644,
        like: Path | None = None,
        synced: bool = True,
    ) -> None:
        self._operate()
        REAL["write"](path, chunks, mode, like)
        data = path.read_bytes()
        file = File()
        self._hold(path, file)
        self.point()
        for part in (data[: len(data) // 2], data):
            file.data, file.outcomes = part, []
            self.point()
        if synced:
            self._keep(file)
            self.point()

    def sync(self, path: Path) -> None:
        if path != self.root and self.root not in path.parents:
            return  # of another disk
        self._operate()
        self._keep(self._find(path))
        self.point()

    def rename(self, source: Path, target: Path) -> None:
        self._operate()
        REAL["rename"](source, target)
        node = self._find(source)
        self._hold(target, node)
        self._hold(source, None)
        self.point()

    def link(self, source: Path, target: Path) -> None:
        self._operate()
        REAL["link"](source, target)
        self._hold(target, self._find(source))
        self.point()

    def unlink(self, path: Path) -> None:
        self._operate()
        REAL["unlink"](path)
        self._hold(path, None)
        self.point()

    def rmdir(self, path: Path) -> None:
        self._operate()
        REAL["rmdir"](path)
        self._hold(path, None)
        self.point()

    def mkdir(self, path: Path, mode: int = 0o777, like: Path | None = None) -> None:
        self._operate()
        REAL["mkdir"](path, mode, like)
        self._hold(path, Folder())
        self.point()

    def share(self, path: Path, group: int) -> None:
        """Who may read is not part of a tree: a cut changes nothing that a restart of the owner could see."""
        self._operate()
        REAL["share"](path, group)
        self.point()

    @contextlib.contextmanager
    def lock(self, path: Path, wait: float = 0.0) -> Iterator[None]:
        self._operate()
        with REAL["lock"](path, wait):
            if self._folder(path).names.get(path.name, [None])[-1] is None:
                self._hold(path, File())
                self.point()
            yield

    def overwrite(self, path: Path, data: bytes, synced: bool = True) -> None:
        """What `disk` does not offer, for the damaged stores of test_simulator: write into a file that is there."""
        path.write_bytes(data)
        file = self._find(path)
        assert isinstance(file, File)
        for part in (data[: len(data) // 2], data):
            file.data, file.outcomes = part, []
            self.point()
        if synced:
            self._keep(file)
            self.point()

    def _keep(self, node: File | Folder) -> None:
        if isinstance(node, File):
            node.kept, node.outcomes = node.data, []
        else:
            node.names = {
                name: held[-1:] for name, held in node.names.items() if held[-1] is not None
            }

    def _hold(self, path: Path, node: File | Folder | None) -> None:
        self._folder(path).names.setdefault(path.name, [None]).append(node)

    def _folder(self, path: Path) -> Folder:
        folder = self._find(path.parent)
        assert isinstance(folder, Folder)
        return folder

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder | None = self.top
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.names[part][-1]
        assert node is not None
        return node


def _load(path: Path) -> Folder:
    """A folder as it lies there, all of it synced."""
    return Folder(
        {
            p.name: [_load(p) if p.is_dir() else _synced(p.read_bytes())]
            for p in sorted(path.iterdir())
        }
    )


def _synced(data: bytes) -> File:
    return File(data, data)


def lay_out(tree: Tree, folder: Path) -> None:
    """Make a disk's state real, in a new folder."""
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content.data)


class Restarts:
    """What comes of a state, worked out once for all states that a restart cannot tell from each other: those with the same names
    in which every file that the restart read is the same.

    restart: takes a folder in such a state, and returns what it found.
    """

    def __init__(self, restart: Callable[[Path], object], folder: Path) -> None:
        self._restart, self._folder = restart, folder
        self._known: dict[object, list[tuple[dict[str, Content | None], object]]] = {}
        self.count = 0

    def outcome(self, tree: Tree) -> object:
        """What `restart` returned for this state or one like it; the exception, where it raised one."""
        shape = tuple(sorted((path, content is None) for path, content in tree.items()))
        known = self._known.setdefault(shape, [])
        for read, found in known:
            if all(tree[path] == content for path, content in read.items()):
                return found
        self.count += 1
        root = self._folder / str(self.count)
        lay_out(tree, root)
        left = {root / path: path for path in tree}  # what still is what the disk was left in
        read = {}

        def noted(path: Path) -> Iterator[bytes]:
            if path in left:
                read[left[path]] = tree[left[path]]
            return REAL["read"](path)

        def unlink(path: Path) -> None:
            left.pop(path, None)
            REAL["unlink"](path)

        def rmdir(path: Path) -> None:
            left.pop(path, None)
            REAL["rmdir"](path)

        def rename(source: Path, target: Path) -> None:
            assert source not in left, "a restart renames only what it has made"
            left.pop(target, None)
            REAL["rename"](source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            for operation in (unlink, rmdir, rename):
                patch.setattr(disk, operation.__name__, operation)
            patch.setattr(disk, "read", noted)
            try:
                found = self._restart(root)
            except Exception as error:
                found = error
        known.append((read, found))
        return found

"""ExecuTorch: a program (model.pte) and its adapted weights and head, raw in model.ptd. An update writes another .ptd beside the
old one, patched with numpy alone, and loads the pair anew; the program never changes.

`workspace` holds model.pte and model.ptd of the generation in force, for programs in C++, Java or Swift beside this one; and
new-*.ptd, each of a generation that is not in force yet, or of a process that was killed. Whoever may only read it loads from
a new-*.ptd where temporary files go.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import InputError, StorageError
from ...formats.bundle import DTYPES, HEAD_BIAS, Bundle
from ...shortage import verdict
from ...storage import atomic, disk
from . import Engine, with_room

PROGRAM, DATA = "model.pte", "model.ptd"
ABANDONED = 3600
"""seconds after which a new-*.ptd that nobody published is one that a killed process left"""


def patched(
    data: BinaryIO,
    places: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, np.ndarray],
    capacity: int = 0,
) -> Iterator[bytes]:
    """The bytes of a .ptd file with other values, piece by piece: one weight at a time need be held.

    places: as the manifest's `weights`. weights: {tensor: float32, of the place's shape once it has room for `capacity` classes}.
    Raises InputError for a tensor that has no place, has another shape, or would lie outside the file.
    """
    if missing := set(weights) - set(places):
        raise InputError(
            f"{DATA} has no place for {', '.join(sorted(missing))}: export the bundle again"
        )
    size = data.seek(0, os.SEEK_END)
    end = data.seek(0)
    for name in sorted(weights, key=lambda name: places[name]["offset"]):
        start, shape = places[name]["offset"], tuple(places[name]["shape"])
        values = with_room(name, weights[name], capacity).astype(DTYPES[places[name]["dtype"]])
        if values.shape != shape or not end <= start <= size - values.nbytes:
            raise InputError(
                f"{name} {values.shape} does not fit {DATA}, which has {shape} at byte {start} of {size}"
            )
        yield data.read(start - end)
        yield values.tobytes()
        end = data.seek(start + values.nbytes)
    yield data.read()


class _Loaded:
    """A loaded pair. path: the .ptd it was loaded from, removed with this object unless it was published."""

    def __init__(self, method: Any, path: Path, classes: int, published: bool) -> None:
        self.method, self.path, self.classes, self.published = method, path, classes, published
        weakref.finalize(self, _remove, path)


class ExecutorchEngine(Engine):
    """Needs the package executorch, whose Python runtime imports torch; a C++ program that loads the pair needs neither.

    threads: ExecuTorch has one pool of threads for the process, so the last engine that was made decides.
    """

    def __init__(self, bundle: Bundle, threads: int, workspace: Path) -> None:
        self._bundle, self._workspace = bundle, workspace
        self._load, self._tensor = _runtime(threads)
        self._lock = threading.Lock()  # a method computes in its own memory, one image at a time

    @classmethod
    def without_running(cls, bundle: Bundle, workspace: Path) -> ExecutorchEngine:
        engine = cls.__new__(cls)
        engine._bundle, engine._workspace, engine._load = (
            bundle,
            workspace,
            lambda program, data: None,
        )
        engine.runs = False
        return engine

    def load(self, weights: Mapping[str, np.ndarray]) -> _Loaded:
        """Raises InputError where the pair cannot be loaded, StorageError where the .ptd cannot be written."""
        manifest = self._bundle.manifest
        path, published = self._place(
            lambda data: patched(data, manifest.weights, weights, manifest.capacity)
        )
        try:
            return _Loaded(
                self._load(self._bundle.path / PROGRAM, path),
                path,
                len(weights[HEAD_BIAS]),
                published,
            )
        except (
            Exception
        ) as error:  # the runtime raises RuntimeError, or what pybind11 makes of the rest
            _remove(path)
            raise verdict(
                error,
                InputError(f"{self._bundle.path / PROGRAM}: ExecuTorch cannot load it: {error}"),
            ) from error

    def run(self, loaded: _Loaded, inputs: np.ndarray) -> np.ndarray:
        images = self._tensor(np.ascontiguousarray(inputs, np.float32))
        found = np.empty((len(inputs), loaded.classes), np.float32)
        for i in range(len(inputs)):
            with self._lock:
                (logits,) = loaded.method.execute([images[i : i + 1]])
            found[i] = logits[0, : loaded.classes].numpy()
        return found

    def published(self, loaded: _Loaded) -> bool:
        return loaded.published and (self._workspace / PROGRAM).exists()

    def require_publishing(self) -> None:
        if not self._writable():
            raise StorageError(
                f"{self._workspace} cannot be written: let this user write there, or update as its owner"
            )

    def _writable(self) -> bool:
        return os.access(
            self._workspace if self._workspace.exists() else self._workspace.parent,
            os.W_OK,
            effective_ids=True,
        )

    def publish(self, loaded: _Loaded) -> None:
        """Other programs find the pair in the workspace from now on: the old one until the rename, then this one.

        Raises StorageError.
        """
        try:
            if not (self._workspace / PROGRAM).exists():
                self._link_or_copy_program()
            if not loaded.published:
                disk.rename(loaded.path, self._workspace / DATA)
                loaded.published = True
            disk.sync(self._workspace)
        except OSError as error:
            raise atomic.unwritten(self._workspace / DATA, error) from error
        for left in [*self._workspace.glob("new-*"), *self._workspace.glob(f"{atomic.TEMPORARY}*")]:
            with contextlib.suppress(OSError):
                # a link has the age of what it links to, so its name says when it was made
                begun = (
                    int(left.name.split("-")[1])
                    if left.name.startswith("new-")
                    else left.stat().st_mtime
                )
                if time.time() - begun > ABANDONED:
                    left.unlink()

    def _place(self, values: Callable[[BinaryIO], Iterator[bytes]]) -> tuple[Path, bool]:
        """The flashed .ptd with other values, in a file of its own: another name of the published one where that is the same,
        and whether it is."""
        folder = self._workspace if self._writable() else atomic.temporary()
        path = folder / f"new-{time.time():.0f}-{uuid.uuid4().hex}.ptd"
        try:
            with (
                atomic.reading(self._bundle.path / DATA),
                open(self._bundle.path / DATA, "rb") as flashed,
            ):
                with contextlib.suppress(OSError):
                    # by a name of our own, for another process may publish while this one reads
                    os.link(self._workspace / DATA, path)
                    if _holds(path, values(flashed)):
                        return path, True
                    path.unlink()
                atomic.write(path, values(flashed), like=self._bundle.path)
                # whoever may not write may often not give names either
                return path, folder != self._workspace and _holds(
                    self._workspace / DATA, values(flashed)
                )
        except BaseException:
            _remove(path)
            raise

    def _link_or_copy_program(self) -> None:
        source, target = self._bundle.path / PROGRAM, self._workspace / PROGRAM
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            atomic.write(target, atomic.read(source), like=self._bundle.path)


def _runtime(threads: int) -> tuple[Any, Any]:
    """What loads a pair's method, and what makes a tensor of an array. Raises InputError where executorch is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that the interface is experimental, and the package's own deprecations
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
            from torch import from_numpy  # the runtime takes no other arrays, and has imported it
    except ImportError as error:
        missing = InputError(
            f"ExecuTorch's Python runtime cannot be imported ({error}): run pip install 'sdlora-edge[executorch]', which "
            "brings torch too; or, if a C++ program loads the pair, use --unproved (docs/executorch.md)"
        )
        raise verdict(error, missing) from error
    if threads and portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)

    def load(program: Path, data: Path) -> Any:
        return Runtime.get().load_program(program, data_path=data).load_method("forward")

    return load, from_numpy


def _holds(path: Path, pieces: Iterator[bytes]) -> bool:
    """Whether a file that can be read is made of these pieces."""
    try:
        with open(path, "rb") as file:
            return all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)
    except OSError:
        return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()

"""ExecuTorch: a program (model.pte), and a .ptd file with its adapted weights and head, raw.

An update writes another .ptd, patched with numpy alone, and loads the pair anew; the program never
changes.

The workspace is for programs in C++, Java or Swift. It holds:

    current.json      the generation in force, and the SHA-256 of the two files it consists of
    model.pte         the program
    <SHA-256>.ptd     weights, under a name that no other content ever has
    new-*.ptd         of a generation that is not in force yet, or of a process that was killed

The rename of current.json is the commit: at every moment it names a program and weights that are
complete and belong together. A process that may only read the workspace keeps its new-*.ptd where
temporary files go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import InputError, StorageError
from ...formats.bundle import DTYPES, HEAD_BIAS, Bundle
from ...formats.current import Current
from ...inputs.modality import Inputs, count, filled
from ...shortage import verdict
from ...state import TaskState
from ...storage import atomic, disk
from . import Engine, Outputs, with_room

PROGRAM, DATA = "model.pte", "model.ptd"
"""in the bundle"""
SUFFIX = ".ptd"
ABANDONED = 3600
"""seconds after which a new-*.ptd that nobody published is one that a killed process left"""


def patched(
    data: BinaryIO,
    places: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, np.ndarray],
    capacity: int = 0,
) -> Iterator[bytes]:
    """The bytes of a .ptd file with other values, in pieces: one weight is held at a time.

    Args:
        data: The .ptd file.
        places: The manifest's `weights`.
        weights: {tensor: float32}, of the place's shape once it has room for `capacity` classes.
        capacity: Rows of the head in the file; 0 if the head has as many as there are classes.

    Raises:
        InputError: A tensor has no place, has another shape, or would lie outside the file.
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
                f"{name} {values.shape} does not fit {DATA}, which has {shape} at byte {start} "
                f"of {size}: export the bundle again"
            )
        yield data.read(start - end)
        yield values.tobytes()
        end = data.seek(start + values.nbytes)
    yield data.read()


@dataclass(frozen=True)
class _Weights:
    """A .ptd file under a name of our own, and the SHA-256 of its content."""

    path: Path
    sha256: str


class _Loaded:
    """A loaded pair.

    Its file `weights.path` is removed with this object, unless it was published.
    """

    def __init__(self, method: Any, weights: _Weights, classes: int) -> None:
        self.method, self.weights, self.classes = method, weights, classes
        weakref.finalize(self, _remove, weights.path)


class ExecutorchEngine(Engine):
    """Needs the package executorch, whose Python runtime imports torch.

    A C++ program that loads the pair needs neither.

    ExecuTorch has one pool of threads for the process, so the `threads` of the last engine made
    decide.
    """

    def __init__(self, bundle: Bundle, threads: int, workspace: Path) -> None:
        self._bundle, self._workspace = bundle, workspace
        self._load, self._tensor = _runtime(threads)
        self._lock = threading.Lock()  # a method computes in its own memory, one item at a time

    @classmethod
    def without_running(cls, bundle: Bundle, workspace: Path) -> ExecutorchEngine:
        engine = cls.__new__(cls)
        engine._bundle, engine._workspace = bundle, workspace
        engine._load = lambda program, data: None
        engine.runs = False
        return engine

    def load(self, weights: Mapping[str, np.ndarray]) -> _Loaded:
        """Raises InputError if the pair cannot be loaded, StorageError if it cannot be written."""
        manifest, program = self._bundle.manifest, self._bundle.path / PROGRAM
        made = self._place(lambda data: patched(data, manifest.weights, weights, manifest.capacity))
        try:
            return _Loaded(self._load(program, made.path), made, len(weights[HEAD_BIAS]))
        except Exception as error:  # RuntimeError, or what pybind11 makes of other errors
            _remove(made.path)
            raise verdict(
                error, InputError(f"{program}: ExecuTorch cannot load it: {error}")
            ) from error

    def outputs(self, loaded: _Loaded, inputs: Inputs) -> Outputs:
        meta = loaded.method.metadata
        tensors = [
            self._tensor(np.ascontiguousarray(filled(array, meta.input_tensor_meta(i).sizes()[1:])))
            for i, array in enumerate(inputs.values())
        ]
        logits, features = np.empty((count(inputs), loaded.classes), np.float32), []
        for i in range(len(logits)):
            with self._lock:  # its outputs are copied before the next item overwrites them
                first, *more = loaded.method.execute([one[i : i + 1] for one in tensors])
                logits[i] = first[0, : loaded.classes].numpy()
                features += [np.array(one[0].numpy(), np.float32) for one in more[:1]]
        return Outputs(logits, np.stack(features) if features else None)

    def published(self, loaded: _Loaded, state: TaskState) -> bool:
        current = self._current(loaded, state)
        names = disk.names(self._workspace) if self._workspace.exists() else {}
        return Current.read(self._workspace) == current and set(current.files) <= set(names)

    def require_publishing(self) -> None:
        if not self._writable():
            raise StorageError(
                f"{self._workspace} cannot be written: "
                "let this user write there, or update as its owner"
            )

    def publish(self, loaded: _Loaded, state: TaskState) -> None:
        """Other programs find the pair in the workspace from now on. Raises StorageError."""
        current, made = self._current(loaded, state), loaded.weights
        data = self._workspace / f"{made.sha256}{SUFFIX}"
        try:
            if not (self._workspace / PROGRAM).exists():
                self._link_or_copy_program()
            # If it is there already it may be damaged, so it is replaced if this process has a copy
            # of its own.
            if made.path.exists() or not data.exists():
                disk.rename(made.path, data)
            # Both files stay before current.json names them: a power cut never leaves it pointing
            # at nothing.
            disk.sync(self._workspace)
        except OSError as error:
            raise atomic.unwritten(data, error) from error
        if Current.read(self._workspace) != current:
            current.write(self._workspace, like=self._bundle.path)
        # Only now: until the rename of current.json survives a power cut, the weights before it may
        # be needed.
        self._sweep(current)

    def _current(self, loaded: _Loaded, state: TaskState) -> Current:
        manifest, weights = self._bundle.manifest, loaded.weights.sha256
        files = {PROGRAM: manifest.files[PROGRAM]["sha256"], f"{weights}{SUFFIX}": weights}
        return Current.of(manifest.lineage, state, files)

    def _sweep(self, current: Current) -> None:
        """Remove weights that are no longer in force.

        What cannot be removed does no harm and stays.
        """
        for path in [*self._workspace.glob(f"*{SUFFIX}"), *self._workspace.glob(".tmp-*")]:
            if path.name not in current.files and not _in_use(path):
                _remove(path)

    def _writable(self) -> bool:
        folder = self._workspace if self._workspace.exists() else self._workspace.parent
        return os.access(folder, os.W_OK, effective_ids=True)

    def _place(self, values: Callable[[BinaryIO], Iterator[bytes]]) -> _Weights:
        """The flashed .ptd with other values, in a file of our own.

        It is a link to the published file if that has the same content.
        """
        folder = self._workspace if self._writable() else atomic.temporary()
        path = folder / f"new-{time.time():.0f}-{uuid.uuid4().hex}{SUFFIX}"
        flashed = self._bundle.path / DATA
        try:
            with atomic.reading(flashed), open(flashed, "rb") as file:
                if published := self._published():
                    with contextlib.suppress(OSError):
                        # By a name of our own: another process may publish while this one reads,
                        # and remove that file.
                        disk.link(published, path)
                        digest = hashlib.sha256()
                        if _holds(path, _digested(values(file), digest)):
                            return _Weights(path, digest.hexdigest())
                        _remove(path)
                digest = hashlib.sha256()
                atomic.write(path, _digested(values(file), digest), like=self._bundle.path)
                return _Weights(path, digest.hexdigest())
        except BaseException:
            _remove(path)
            raise

    def _published(self) -> Path | None:
        """The weights that current.json names."""
        current = Current.read(self._workspace)
        names = [name for name in current.files if name.endswith(SUFFIX)] if current else []
        return self._workspace / names[0] if names else None

    def _link_or_copy_program(self) -> None:
        source, target = self._bundle.path / PROGRAM, self._workspace / PROGRAM
        try:
            disk.link(source, target)
        except OSError:  # another file system, or one without links
            atomic.write(target, atomic.read(source), like=self._bundle.path)


def _runtime(threads: int) -> tuple[Any, Any]:
    """A function that loads a pair's method, and one that makes a tensor of an array.

    Raises InputError if not installed.
    """
    try:
        with warnings.catch_warnings():
            # The interface is experimental, and the package uses deprecated names of its own.
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
            from torch import (
                from_numpy,
            )  # the runtime accepts no other arrays, and has imported torch
    except ImportError as error:
        missing = InputError(
            f"ExecuTorch's Python runtime cannot be imported ({error}): "
            "run pip install 'sdlora-edge[executorch]', which brings torch too; "
            "or, if a C++ program loads the pair, use --unproved (docs/executorch.md)"
        )
        raise verdict(error, missing) from error
    if threads and portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)

    def load(program: Path, data: Path) -> Any:
        return Runtime.get().load_program(program, data_path=data).load_method("forward")

    return load, from_numpy


def _digested(pieces: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    """The same pieces, digested as they pass."""
    for piece in pieces:
        digest.update(piece)
        yield piece


def _holds(path: Path, pieces: Iterator[bytes]) -> bool:
    """Whether a file consists of these pieces."""
    chunks, held = disk.read(path), b""
    for piece in pieces:
        while len(held) < len(piece) and (chunk := next(chunks, b"")):
            held += chunk
        if held[: len(piece)] != piece:
            return False
        held = held[len(piece) :]
    return not held and not next(chunks, b"")


def _in_use(path: Path) -> bool:
    """Whether a process may still be making this file: it is younger than ABANDONED."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if path.name.startswith("new-"):
            # Not its age: a link is as old as the file it is a link to.
            return time.time() - int(path.name.split("-")[1]) <= ABANDONED
        return path.name.startswith(atomic.TEMPORARY) and (
            time.time() - path.stat().st_mtime <= ABANDONED
        )
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        disk.unlink(path)

"""A model is tried in a child process before this one opens it: a runtime that crashes must not end
the program that asked, without a message.

If no child can be had (a frozen program, an interpreter that does not start), nothing is tried.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ..errors import HealthError, ResourceError, SdloraError
from ..formats.bundle import INPUTS, MANIFEST, Manifest, open_bundle
from ..formats.canonical import sha256
from ..storage import atomic
from .engines import RUNTIMES

BEGUN, SEPARATOR = "begun", "\n"
CRASHES = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGSYS,
    signal.SIGTRAP,
}
"""signals by which a process dies of what it does itself; others come from outside"""

_survived: set[str] = set()
"""ids of bundles that a child of this process has opened"""


def tried(store: Path, unproved: bool) -> Path:
    """The store, once a child process has opened it; each bundle is tried once in the life of this one.

    unproved: nothing is run here, so nothing is tried. Raises HealthError if the child dies by a signal,
    ResourceError if memory ran out. Any other error is left to this process, which finds it again.
    """
    data = atomic.read(store / "bundle" / MANIFEST)
    if unproved or sha256(data) in _survived or not sys.executable or getattr(sys, "frozen", False):
        return store
    command = child(open_store, store.absolute())
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError:  # no process can be had now
        return store
    if done.returncode == 0:
        _survived.add(sha256(data))
    elif done.returncode < 0 and done.stdout.startswith(BEGUN):
        raise _error(_signal(-done.returncode), done.stderr, Manifest.from_json(data))
    return store


def child(function: Callable[..., None], *arguments: object) -> list[str]:
    """The command that calls a function of this package in another interpreter, its arguments as text.

    It gets this one's `sys.path`, and nothing of its `__main__`. Without -I, a module in the current
    folder would be taken for one that Python needs before.
    """
    call = f"import sys; sys.path[:] = sys.argv[1].split({SEPARATOR!r}); "
    call += f"from {function.__module__} import {function.__name__} as call; call(*sys.argv[2:])"
    return [
        sys.executable,
        "-I",
        "-c",
        call,
        SEPARATOR.join(map(str, sys.path)),
        *map(str, arguments),
    ]


def open_store(store: str) -> None:
    """What the child does: load the model, and run its canary."""
    print(BEGUN, flush=True)
    from .device import Device  # which imports this module
    from .store import Store

    Device(Store(Path(store)), open_bundle(Path(store) / "bundle"))


def _signal(number: int) -> signal.Signals:
    """SIGKILL for one without a name, which comes from outside as well."""
    return signal.Signals(number) if number in set(signal.Signals) else signal.SIGKILL


def _error(died: signal.Signals, stderr: str, manifest: Manifest) -> SdloraError:
    if (
        died not in CRASHES or "bad_alloc" in stderr
    ):  # ended by someone who was short of memory, mostly
        return ResourceError(
            f"the model could not be tried (a child process was ended by {died.name}): free memory, then try again"
        )
    runtime = RUNTIMES.get(manifest.target, f"the engine for target {manifest.target}")
    facts = f"target {manifest.target}, precision {manifest.precision}, weights as {manifest.weights_as}"
    with contextlib.suppress(metadata.PackageNotFoundError):
        facts = f"{runtime} {metadata.version(runtime)}, {facts}"
    other = (
        ", or export the bundle with --weights-as constants"
        if manifest.weights_as == INPUTS
        else ""
    )
    return HealthError(
        f"the model crashes on this machine ({died.name} in a child process; {facts}): install another version of {runtime}{other}"
    )

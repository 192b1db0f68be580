"""Tries a model in a child process before this one opens it.

A runtime that crashes must not end the calling program.

If no child process can be started (a frozen program, an interpreter that does not start), nothing
is tried.
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
from ..formats.bundle import INPUTS, MANIFEST, Manifest
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
"""Signals that a process causes itself; others come from outside."""

_survived: set[tuple[str, str]] = set()
"""(id, provider) of bundles that a child of this process has opened."""


def tried(
    store: Path, unproved: bool, opens: Callable[[str, str], None], provider: str = ""
) -> Path:
    """The same path, after a child process has opened the store.

    Each bundle is tried once in the life of this process.

    Any other error of the child is left to this process, which meets it again.

    Args:
        store: The store's folder.
        unproved: No model runs here, so nothing is tried.
        opens: What the child does: print BEGUN, load the model and run its canary.
        provider: What computes it.

    Raises:
        HealthError: The child crashed.
        ResourceError: The child ran out of memory.
    """
    data = atomic.read(store / "bundle" / MANIFEST)
    own = sha256(data), provider
    if unproved or own in _survived or not sys.executable or getattr(sys, "frozen", False):
        return store
    command = child(opens, store.absolute(), provider)
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
        _survived.add(own)
    elif done.returncode < 0 and done.stdout.startswith(BEGUN):
        raise _error(_signal(-done.returncode), done.stderr, Manifest.from_json(data))
    return store


def child(function: Callable[..., None], *arguments: object) -> list[str]:
    """The command that calls a function of this package in another interpreter.

    The child gets this process's `sys.path`, and nothing of its `__main__`. Without -I, Python
    would import a module in the current folder in place of one of its own.
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


def _signal(number: int) -> signal.Signals:
    """The signal with this number; SIGKILL if it has no name, because it comes from outside too."""
    return signal.Signals(number) if number in set(signal.Signals) else signal.SIGKILL


def _error(died: signal.Signals, stderr: str, manifest: Manifest) -> SdloraError:
    # A signal from outside: most often the kernel, which was short of memory.
    if died not in CRASHES or "bad_alloc" in stderr:
        return ResourceError(
            f"the model could not be tried (a child process was ended by {died.name}): "
            "free memory, then try again"
        )
    runtime = RUNTIMES.get(manifest.target, f"the engine for target {manifest.target}")
    facts = f"target {manifest.target}, precision {manifest.precision}"
    facts += f", weights as {manifest.weights_as}"
    with contextlib.suppress(metadata.PackageNotFoundError):
        facts = f"{runtime} {metadata.version(runtime)}, {facts}"
    other = (
        ", or export the bundle with --weights-as constants"
        if manifest.weights_as == INPUTS
        else ""
    )
    return HealthError(
        f"the model crashes on this machine ({died.name} in a child process; {facts}): "
        f"install another version of {runtime}{other}"
    )

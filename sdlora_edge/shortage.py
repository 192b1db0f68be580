"""Memory, disk space or open files that ran out: how libraries report it, in one place.

A shortage says nothing about a file, and passes. What it interrupts stays as it was and can be
tried again.
"""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ResourceError, SdloraError

_ERRNO = {
    errno.ENOMEM: "memory",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
    errno.EMFILE: "open files",
    errno.ENFILE: "open files",
}
_SAID = re.compile(
    "bad_alloc|bad allocation|allocate memory|out of memory|failed to map segment|start new thread"
    "|error:? 0x:?(21|25|31)$",
    re.I,
)
"""Words of ONNX Runtime, torch and the dynamic loader, and numbers of ExecuTorch: they set no
errno."""


def shortage(error: BaseException, doing: str = "") -> ResourceError | None:
    """The error to raise if this one says that something ran out; None if it says something else.

    Words in our own errors, and in those of Python's checks of a value, are not searched: they may
    come from a file.
    """
    if isinstance(error, ResourceError):
        return error
    if isinstance(error, MemoryError):
        what: str | None = "memory"
    elif isinstance(error, OSError) and error.errno is not None:
        what = _ERRNO.get(error.errno)
    elif isinstance(error, OSError):  # of Pillow, which names the file in some
        what = "memory" if str(error).startswith("out of memory") else None
    elif isinstance(error, (SdloraError, LookupError, TypeError, ValueError)):
        what = None
    else:
        what = "memory" if _SAID.search(str(error)) else None
    if (
        what is None and error.__cause__ and not isinstance(error, SdloraError)
    ):  # what a library made of it
        return shortage(error.__cause__, doing)
    said = f" ({error})" if str(error) else ""
    return (
        ResourceError(f"{what} ran out{doing and f' {doing}'}{said}: free some, then try again")
        if what
        else None
    )


def verdict(error: BaseException, blame: SdloraError) -> SdloraError:
    """The error to raise for one of a library or the system: `blame`, unless something ran out."""
    return shortage(error) or blame


@contextmanager
def noticed(doing: str) -> Iterator[None]:
    """Whatever runs out in this block is a ResourceError that tells what was being done."""
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if found := shortage(error, doing):
            raise found from error
        raise


def require_memory(size: int) -> None:
    """Raises MemoryError unless this number of bytes is available.

    Ask before calling a library that ends the process if it gets no memory.
    """
    try:
        mmap.mmap(-1, size).close()
    except OSError as error:
        raise MemoryError(f"{size:,} bytes") from error

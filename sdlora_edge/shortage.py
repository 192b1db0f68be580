"""Memory, disk space or open files that ran out: how libraries report it, in one place.

It is no verdict on any file, and passes: whatever it interrupts is left as it was, and can be tried
again.
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
"""how ONNX Runtime, torch, the dynamic loader and (by its numbers) ExecuTorch say it, who give no
errno"""


def shortage(error: BaseException, doing: str = "") -> ResourceError | None:
    """What ran out, if that is what this error says; None if it says something else.

    Our own errors, and those of Python's checks of a value, are never read for words: these may
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

"""Bodies of requests: bounded one by one, together, and in time; nothing of them on a disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ..errors import LimitError, SdloraError, UsageError
from .batching import Busy

SLOWEST = 20.0
"""seconds that a body may take to arrive"""
BODY = 16 * 10**6
"""bytes that a body may have if nobody says"""


class TooSlow(SdloraError):
    """A body does not arrive in time."""


@dataclass
class _Body:
    """A body that arrives. taken: Bytes of it that count as held."""

    bodies: Bodies
    data: bytearray
    taken: int = 0

    async def read(self, request: Request) -> None:
        # what is declared is taken at once: else many would begin, and none could end
        self._take(_length(request))
        async for chunk in _in_time(request):
            self.data += chunk
            self._take(len(self.data))

    def _take(self, size: int) -> None:
        """Count so many bytes as held. Raises LimitError and Busy."""
        bodies, more = self.bodies, max(0, size - self.taken)
        if size > bodies.each:
            raise LimitError(f"the body has more than {bodies.each} bytes: send less at once")
        if bodies.held > self.taken and bodies.held + more > bodies.together():
            raise Busy("too many bytes wait for an answer: try again later")
        bodies.held += more
        self.taken += more


class Bodies:
    """Holds the bodies of requests until they are answered.

    Args:
        each: Bytes of a body, at most.
        together: Returns how many bytes all of them may have now. A single one is always held.

    Attributes:
        held: Bytes that are held now.
    """

    def __init__(self, each: int, together: Callable[[], int]) -> None:
        self.each, self.together = each, together
        self.held = 0

    @contextlib.asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request.

        Raises:
            LimitError: It has too many bytes.
            Busy: All bodies together have.
            TooSlow: It does not arrive in time.
        """
        body = _Body(self, bytearray())
        try:
            try:
                await body.read(request)
            except (LimitError, Busy):
                # a client that still sends would not read the answer
                with contextlib.suppress(TooSlow, ClientDisconnect):
                    await _discard(request, self.each)
                raise
            data, body.data = bytes(body.data), bytearray()
            yield data
        finally:
            self.held -= body.taken


def _length(request: Request) -> int:
    given = request.headers.get("content-length", "")
    return int(given[:15]) if given.isascii() and given.isdigit() else 0


async def _in_time(request: Request) -> AsyncIterator[bytes]:
    end = asyncio.get_running_loop().time() + SLOWEST
    chunks = request.stream()
    while True:
        try:
            left = end - asyncio.get_running_loop().time()
            yield await asyncio.wait_for(anext(chunks), left)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise TooSlow(f"the body did not arrive within {SLOWEST:g} s: send it again") from None


async def _discard(request: Request, most: int) -> None:
    count = 0
    async for chunk in _in_time(request):
        count += len(chunk)
        if count > most:
            return


async def parts(headers: Headers, data: bytes, most: int) -> list[tuple[str, bytes]]:
    """(file name, content) of each file of a multipart body.

    Raises:
        UsageError: It is malformed, or has too many files, none, or other fields.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    parser = MultiPartParser(headers, stream(), max_files=most, max_fields=0)
    parser.spool_max_size = len(data)  # never a file on the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UsageError(
            f"the multipart body cannot be read ({error.message}): send one file for each input"
        ) from error
    try:
        found = [
            (value.filename or name, await value.read())
            for name, value in form.multi_items()
            if not isinstance(value, str)
        ]
    finally:
        await form.close()
    if not found:
        raise UsageError("the multipart body holds no file: send one file for each input")
    return found

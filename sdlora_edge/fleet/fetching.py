"""Gets files over HTTP, HTTPS or from a folder (`file://`), and goes on after a cut.

`Fetcher` is what python-tuf's client downloads with. A link that is cut every 100 kB brings any
file: each try goes on where the one before ended (RFC 9110, range requests), and tries are counted
anew after PROGRESS more bytes. A server that sends a byte now and then cannot hold a device: the
head of an answer must come in time, and the body not slower than LEAST bytes in WINDOW seconds.
"""

from __future__ import annotations

import contextlib
import email.utils
import random
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import timezone
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
)
from tuf.ngclient.fetcher import FetcherInterface

from .. import __version__
from ..errors import SdloraError, UsageError
from ..storage import disk
from .answering import bounded

CHUNK = 16 * 1024
TRIES, PROGRESS = 6, CHUNK
"""tries of one file, counted anew after so many bytes that are new"""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""seconds: the bound of the random wait before the second try, and of all waits"""
REDIRECTS = 5
LEAST, WINDOW = 1024, 30.0
"""A server that sends fewer bytes in so many seconds is too slow."""
AGAIN = 408, 425, 429, 500, 502, 503, 504
"""HTTP statuses after which the same request may succeed"""
Progress = Callable[[int], object]
"""Called with the number of bytes that arrived."""


@dataclass(frozen=True)
class Link:
    """How to reach a repository.

    Attributes:
        max_rate: Bytes a second; 0 for no limit.
        timeout: Seconds to wait for a connection, and for the next byte.
        proxy: URL of a proxy. None takes it from the environment (https_proxy, no_proxy).
        ca: Certificates to trust, in place of the system's.
        client_cert: Certificate that this device shows, in PEM form.
        client_key: Its private key, if it lies in another file.
    """

    max_rate: int = 0
    timeout: float = 30.0
    proxy: str | None = None
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def __post_init__(self) -> None:
        if self.max_rate < 0:
            raise UsageError(f"a rate of {self.max_rate} bytes a second: give 0 or more")
        for path in (self.ca, self.client_cert, self.client_key):
            if path is not None and not path.is_file():
                raise UsageError(f"{path} is not a file: name a file in PEM form")


class Refused(DownloadHTTPError):
    """The server answered with an error. retry_after: seconds that it asks to wait, or None."""

    def __init__(self, url: str, status: int, retry_after: float | None) -> None:
        super().__init__(f"{url}: HTTP status {status}", status)
        self.retry_after = retry_after


class Fetcher(FetcherInterface):
    """One device's link.

    Attributes:
        requests: Number of requests so far.
        received: Bytes so far: bodies, and headers as they would be written.
    """

    def __init__(
        self,
        link: Link | None = None,
        progress: Progress | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.requests = self.received = 0
        self._link, self._progress, self._sleep = link or Link(), progress, sleep
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._held: dict[str, bytes] = {}
        self._budget, self._since = 0.0, time.monotonic()

    def hold(self, url: str, data: bytes) -> None:
        """Answer the next request for a URL with these bytes, which were fetched already."""
        self._held[url] = data

    def fetch(self, url: str) -> Iterator[bytes]:
        """As FetcherInterface says; but our own errors stay what they are."""
        try:
            return super().fetch(url)
        except DownloadError as error:
            if isinstance(error.__cause__, SdloraError):
                raise error.__cause__ from None
            raise

    def _fetch(self, url: str) -> Iterator[bytes]:
        if (held := self._held.pop(url, None)) is not None:
            return iter([held])
        chunks = self.stream(url)
        return _all(next(chunks, b""), chunks)  # here, so that this call raises an HTTP error

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """As FetcherInterface says. A server that sends more is hung up on at once."""
        found = bytearray()
        with contextlib.ExitStack() as stack:
            chunks = self.fetch(url)
            if isinstance(chunks, Generator):
                stack.callback(chunks.close)
            for chunk in chunks:
                found += chunk
                if len(found) > max_length:
                    raise DownloadLengthMismatchError(
                        f"{url} has more than the {max_length} bytes allowed here"
                    )
        return bytes(found)

    def stream(self, url: str, begin: int = 0) -> Generator[bytes, None, None]:
        """The bytes of a URL from `begin` on, over as many requests as it takes.

        Raises:
            DownloadHTTPError: The server refuses (404: it has no such file).
            DownloadError: The link fails again and again, or the server is too slow.
        """
        if (scheme := urlsplit(url).scheme) not in ("http", "https", "file"):
            raise UsageError(f"{url[:200]!r} is no URL of a repository: use http, https or file")
        if scheme == "file":
            yield from self._counted(self._of_folder(url, begin))
            return
        place, tag, tries, counted = begin, "", 0, begin
        while True:
            try:
                with self._response(url, place, tag) as response:
                    tag = tag or response.headers.get("ETag", "")
                    for chunk in self._counted(self._body(response, place)):
                        place += len(chunk)
                        if place >= counted + PROGRESS:
                            tries, counted = 0, place
                        yield chunk
                return
            except (urllib3.exceptions.SSLError, urllib3.exceptions.URLSchemeUnknown) as error:
                raise DownloadError(f"{url}: {_cause(error)}") from error  # it would not pass
            except (urllib3.exceptions.HTTPError, OSError, Refused) as error:
                tries += 1
                self._again(url, error, tries)

    def _again(self, url: str, error: Exception, tries: int) -> None:
        """Wait before the next try, or give up."""
        asked = error.retry_after if isinstance(error, Refused) else None
        if isinstance(error, Refused) and error.status_code not in AGAIN:
            raise error
        if tries >= TRIES or (asked or 0) > LONGEST_WAIT:
            if isinstance(error, Refused):
                raise error
            raise DownloadError(f"{url}: {_cause(error)}") from error
        # Full jitter: a server that comes back is not met by all devices at once.
        bound = min(LONGEST_WAIT, FIRST_WAIT * 2.0**tries)
        self._sleep(asked if asked is not None else random.uniform(0, bound))  # noqa: S311

    @contextlib.contextmanager
    def _response(self, url: str, begin: int, tag: str) -> Iterator[urllib3.BaseHTTPResponse]:
        """An answer of status 200, or 206 from `begin` on."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"sdlora-edge/{__version__}"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
            if tag and not tag.startswith("W/"):
                headers["If-Range"] = tag
        for _ in range(REDIRECTS + 1):
            self.requests += 1
            response = self._pool(url).request(
                "GET", url, headers=headers, preload_content=False, redirect=False, retries=False
            )
            self.received += _head_bytes(response)
            try:
                if (to := response.headers.get("Location")) and 300 <= response.status < 400:
                    url = _redirected(url, to)
                    continue
                if response.status not in (200, 206):
                    raise Refused(url, response.status, _wait_asked(response))
                yield response
                return
            finally:
                response.close()
        raise DownloadError(f"{url}: more than {REDIRECTS} redirects")

    def _body(self, response: urllib3.BaseHTTPResponse, begin: int) -> Iterator[bytes]:
        """The body's bytes from `begin` on. A server without ranges sends the whole again."""
        skip = begin
        if response.status == 206:
            found = response.headers.get("Content-Range", "")
            if not found.startswith(f"bytes {begin}-"):
                raise DownloadError(f"asked for bytes from {begin} on, and got {found[:80]!r}")
            skip = 0
        arrived, waited = 0, 0.0
        while True:
            since = time.monotonic()
            # read1 returns what is there; read would wait until CHUNK bytes are
            if not (chunk := response.read1(CHUNK, decode_content=False)):
                return
            arrived, waited = arrived + len(chunk), waited + time.monotonic() - since
            if waited > WINDOW:
                if arrived < LEAST:
                    raise urllib3.exceptions.HTTPError("the server is too slow")
                arrived, waited = 0, 0.0
            skipped, chunk = min(skip, len(chunk)), chunk[skip:]
            skip -= skipped
            self.received += skipped
            if chunk:
                yield chunk

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The same chunks, counted, and no faster than allowed."""
        for chunk in chunks:
            self.received += len(chunk)
            if self._progress:
                self._progress(len(chunk))
            yield chunk
            if rate := self._link.max_rate:
                clock = time.monotonic()
                self._budget = max(0.0, self._budget - (clock - self._since) * rate) + len(chunk)
                self._since = clock
                if self._budget > rate / 4:  # a burst of a quarter of a second
                    self._sleep((self._budget - rate / 4) / rate)

    def _of_folder(self, url: str, begin: int) -> Iterator[bytes]:
        self.requests += 1
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url[:200]!r} names a machine: write file:///FOLDER")
        try:
            with disk.opened(path) as file:
                file.seek(begin)
                while chunk := file.read(CHUNK):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DownloadHTTPError(f"{path} does not exist", 404) from error
        except OSError as error:  # a stick that was pulled out
            raise DownloadError(f"{path}: {error.strerror or error}") from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = self._link.proxy
        if proxy is None and not urllib.request.proxy_bypass(parts.hostname or ""):
            proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy not in self._pools:
            link = self._link
            more = {
                "timeout": urllib3.Timeout(connect=link.timeout, read=link.timeout),
                "ca_certs": link.ca and str(link.ca),
                "cert_file": link.client_cert and str(link.client_cert),
                "key_file": link.client_key and str(link.client_key),
            }
            try:
                pool = bounded(
                    urllib3.ProxyManager(proxy, **more) if proxy else urllib3.PoolManager(**more)  # type: ignore[arg-type]
                )
            except (ValueError, urllib3.exceptions.HTTPError) as error:
                raise UsageError(f"{proxy!r} is no URL of a proxy: {error}") from error
            self._pools[proxy] = pool
        return self._pools[proxy]


def _all(first: bytes, rest: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    with contextlib.closing(rest):
        yield first
        yield from rest


def _redirected(url: str, to: str) -> str:
    found = urljoin(url, to)
    secure = urlsplit(url).scheme == "https"
    if urlsplit(found).scheme not in (("https",) if secure else ("http", "https")):
        raise DownloadError(f"{url} leads to {found[:200]}, which is not followed")
    return found


def _head_bytes(response: urllib3.BaseHTTPResponse) -> int:
    return 17 + sum(len(name) + len(value) + 4 for name, value in response.headers.items())


def _wait_asked(response: urllib3.BaseHTTPResponse) -> float | None:
    """Seconds in `Retry-After`, which is a number or a date (RFC 9110, 10.2.3)."""
    asked = response.headers.get("Retry-After", "")
    if asked.isdecimal():
        return float(asked[:9])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = email.utils.parsedate_to_datetime(asked)
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - time.time())
    return None


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error)[:300]

"""A bound on the time until a server has answered.

A socket's own timeout begins anew with each byte. So a server that sends the head of its answer
byte by byte would be waited for without end.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

LONGEST = 60.0
"""seconds from the end of a request to the end of the answer's head"""


@contextlib.contextmanager
def _in_time(sock: socket.socket | None) -> Iterator[None]:
    """Raises TimeoutError if the block took too long. Then the socket was shut down."""
    late = threading.Event()

    def end() -> None:
        late.set()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(LONGEST, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if not late.is_set():
            raise
        raise TimeoutError("the server does not answer in time") from error
    finally:
        timer.cancel()
    if late.is_set():  # it looks as if the head had ended
        raise TimeoutError("the server does not answer in time")


class _Plain(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        with _in_time(self.sock):
            return super().getresponse()


class _Tls(HTTPSConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        with _in_time(self.sock):
            return super().getresponse()


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Tls


def bounded(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """The same manager; each of its connections must answer in time."""
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return manager

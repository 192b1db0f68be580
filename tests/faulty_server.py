"""A real HTTP server on 127.0.0.1 with the faults of real ones, and those of an attacker."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = Callable[["Handler"], bool]
"""Answers a request in its own way, or returns False."""


@dataclass
class Faulty:
    """What a server does.

    Attributes:
        folder: What it serves.
        ranges: Whether it takes ranges.
        etag: Its files' tag; empty for none.
        cut: Bytes of a body after which it cuts the link; 0 for never.
        fault: Tried first.
        asked: (path, headers) of each request.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    etag: str = '"1"'
    cut: int = 0
    fault: Fault | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class Handler(BaseHTTPRequestHandler):
    """One request. faulty: of its server."""

    faulty: Faulty
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.faulty.asked.append((self.path, dict(self.headers)))
        if self.faulty.fault and self.faulty.fault(self):
            return
        path = self.faulty.folder / unquote(self.path.split("?")[0]).lstrip("/")
        if path.is_file():
            self.send(path.read_bytes())
        else:
            self.answer(404, b"no such file")

    def send(self, data: bytes) -> None:
        """A file, as far as the link holds."""
        begin, status, headers = 0, 200, {}
        asked = self.headers.get("Range", "")
        fits = self.headers.get("If-Range") in (None, self.faulty.etag)
        if self.faulty.ranges and asked.startswith("bytes=") and fits:
            begin, status = int(asked[6:].rstrip("-")), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.faulty.etag:
            headers["ETag"] = self.faulty.etag
        self.answer(status, data[begin:], headers, self.faulty.cut)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut] if cut else body)
        if cut and cut < len(body):
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, and a handshake that fails, are what is tested."""


@contextlib.contextmanager
def faulty_server(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[Faulty]:
    """Serve a folder; change the faults at any time."""
    faulty = Faulty(folder)
    server = _Server(("127.0.0.1", 0), type("Own", (Handler,), {"faulty": faulty}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "https" if tls is not None else "http"
    faulty.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def statuses(*codes: int, **headers: str) -> Fault:
    """Answer the first requests with these statuses."""
    left = list(codes)

    def fault(handler: Handler) -> bool:
        if not left:
            return False
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.answer(left.pop(0), b"", named)
        return True

    return fault


def endless(handler: Handler) -> bool:
    """Data without end."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"x" * 65536)
    handler.close_connection = True
    return True


def only(part: str, fault: Fault) -> Fault:
    """A fault of the paths that hold this part."""
    return lambda handler: part in handler.path and fault(handler)

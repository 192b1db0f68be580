"""A real webhook."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def until(done: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


class Hook:
    """A real HTTP server that answers POST requests with `status`."""

    def __init__(self) -> None:
        self.status, self.bodies, self.tokens = 200, list[bytes](), list[str | None]()
        self.connections = 0
        self.held = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                hook.connections += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                while hook.held.is_set():
                    time.sleep(0.01)
                if hook.status == 200:
                    hook.bodies.append(body)
                    hook.tokens.append(self.headers["Authorization"])
                self.send_response(hook.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"no")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=lambda: self.server.serve_forever(0.05), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/answers"

    def end(self) -> None:
        self.held.clear()
        self.server.shutdown()
        self.server.server_close()

"""A real HTTP server of a Motion JPEG stream: what the cheapest cameras have."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

STEP = 8
"""grey levels between two frames, so that JPEG changes none into another"""


def grey(level: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), level, np.uint8)).save(data, "JPEG", quality=95)
    return data.getvalue()


FRAMES = [grey(STEP * i) for i in range(256 // STEP)]


class Stream:
    """Frame n is as bright as STEP * (n mod 32).

    Attributes:
        sent: Number of the newest frame.
        cut: Set to break every connection, and refuse new ones.
        silent: Set to answer, and send no frame.
        opened: Number of connections.
    """

    def __init__(self, port: int) -> None:
        self.sent = self.opened = 0
        self.cut, self.silent = threading.Event(), threading.Event()
        self.url = f"http://user:secret@127.0.0.1:{port}/video"
        self.name = f"http://127.0.0.1:{port}/video"

    def number(self, brightness: float) -> int:
        """Of the newest frame that is as bright."""
        level = round(brightness / STEP)
        return self.sent - (self.sent - level) % len(FRAMES)


@contextlib.contextmanager
def streaming(rate: float = 50.0) -> Iterator[Stream]:
    """rate: frames a second, which count whether anybody looks or not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stream.opened += 1
            if stream.cut.is_set():
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            last = 0
            with contextlib.suppress(OSError):
                while not stream.cut.is_set() and not ended.is_set():
                    if stream.silent.is_set() or stream.sent == last:
                        time.sleep(0.005)
                        continue
                    last = stream.sent
                    data = FRAMES[last % len(FRAMES)]
                    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    self.wfile.write(b"--frame\r\n" + head.encode() + data + b"\r\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stream, ended = Stream(server.server_address[1]), threading.Event()

    def count() -> None:
        while not ended.wait(1 / rate):
            stream.sent += 1

    threads = [
        threading.Thread(target=t, daemon=True) for t in (lambda: server.serve_forever(0.05), count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield stream
    finally:
        ended.set()
        server.shutdown()
        server.server_close()

"""A real `device run`, and clients that ask it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

TOKEN = "0123456789abcdef-of-an-agent"  # noqa: S105


def encoded(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (20, 24)) -> bytes:
    """The bytes of an image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def multipart(*files: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A body with files, and its headers."""
    lines = b""
    for name, data in files:
        lines += (
            b'--edge\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n'
            % (name.encode())
        )
        lines += data + b"\r\n"
    return lines + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    data: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class Running:
    """An agent that listens."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    tls: ssl.SSLContext | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def connection(self) -> http.client.HTTPConnection:
        if self.tls is not None:
            return http.client.HTTPSConnection(self.host, timeout=60, context=self.tls)
        return http.client.HTTPConnection(self.host, timeout=60)

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        with contextlib.closing(self.connection()) as connection:
            return request(connection, path, body, {**self.headers, **(headers or {})}, method)

    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line[:1] == "{"]

    def wait(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first event with these facts, as soon as there is one."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for found in self.events():
                if {"event": event, **facts}.items() <= found.items():
                    return found
            time.sleep(0.05)
        raise AssertionError(f"no event {event} {facts} in {self.log.read_text()}")

    def metrics(self) -> dict[str, float]:
        """{name and labels: value}"""
        lines = self.ask("/metrics").data.decode().splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def request(
    connection: http.client.HTTPConnection,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> Answer:
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
    answer = connection.getresponse()
    return Answer(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})


class UnixConnection(http.client.HTTPConnection):
    """To a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("edge", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def agent(
    store: Path, *options: object, environment: Mapping[str, str] | None = None, ready: bool = True
) -> Iterator[Running]:
    """A `device run` on a free port. ready: Wait until its model is open."""
    command = [sys.executable, "-m", "sdlora_edge", "device", "run", "--store", str(store)]
    command += ["--listen", "127.0.0.1:0", "--threads", "1", *map(str, options)]
    log = store.with_name(f"{store.name}.agent.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, **(environment or {})},
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("agent: http"), log.read_text()
        running = Running(process, line.removeprefix("agent: ").strip(), log)
        if ready:
            running.wait("opened")
        yield running
        if process.poll() is None:
            assert running.stop() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

"""Clients that want to hold up an agent: each loses its own connection, and nobody else's."""

from __future__ import annotations

import contextlib
import http.client
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from agents import Answer, encoded, request
from webhook import until

from sdlora_edge.agent.agent import Agent, Serving
from sdlora_edge.agent.origin import Source
from sdlora_edge.fleet import doors, hurrying
from sdlora_edge.fleet.doors import Door

HEAD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
LATE = 0.5


class Served:
    """An agent in this process."""

    def __init__(self, url: str) -> None:
        self.host, self.port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)

    def connect(self) -> socket.socket:
        found = socket.create_connection((self.host, self.port), 10)
        OPEN.append(found)
        return found

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        with contextlib.closing(connection):
            return request(connection, path, body)


OPEN: list[socket.socket] = []


@pytest.fixture
def served(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(hurrying, "OWED", LATE)
    monkeypatch.setattr(doors, "MOST_CONNECTIONS", 6)
    monkeypatch.setattr(hurrying, "REFUSED", 3)
    hurrying.SELDOM._last.clear()
    urls: queue.Queue[str] = queue.Queue()
    with Agent(store, Serving(Door(port=0)), Source(), lambda *_: None) as agent:
        thread = threading.Thread(target=agent.run, args=(urls.put,))
        thread.start()
        found = Served(urls.get(timeout=30))
        until(lambda: found.ask("/healthz").status == 200, 30)
        yield found
        while OPEN:
            OPEN.pop().close()
        assert agent._server is not None
        agent._server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def is_well(served: Served) -> bool:
    with contextlib.suppress(OSError):
        return served.ask("/healthz").status == 200
    return False


def ended(connection: socket.socket, seconds: float = 5) -> bool:
    """Whether the agent closes a connection in this time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:  # it was reset
        return True
    return True


def test_connections_that_say_nothing_keep_nobody_out_for_long(served: Served) -> None:
    silent = [served.connect() for _ in range(20)]
    until(lambda: is_well(served), 10)
    assert all(ended(one) for one in silent)


def test_beyond_the_limit_connections_are_refused_and_then_closed_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hurrying, "OWED", 60.0)
    silent = [served.connect() for _ in range(6)]
    assert served.ask("/healthz").status == 503
    silent += [served.connect() for _ in range(6)]
    assert sum(ended(one, 0.1) for one in silent) == 3
    silent[0].close()


@pytest.mark.parametrize(
    "begin",
    [
        HEAD + b"X: ",
        b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999\r\n\r\n",
        HEAD + b"\r\n" + HEAD + b"X: ",
    ],
    ids=["a head", "a body", "the body of what is refused", "a second head"],
)
def test_a_request_that_comes_byte_by_byte_is_ended(served: Served, begin: bytes) -> None:
    slow = served.connect()
    slow.sendall(begin)
    begun = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() < begun + 10:
            slow.sendall(b"x")
            time.sleep(0.05)
    assert LATE - 0.1 < time.monotonic() - begun < 8
    assert ended(slow)


def test_a_client_that_takes_no_answer_is_ended(served: Served) -> None:
    deaf = socket.socket()
    OPEN.append(deaf)
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    deaf.settimeout(0.2)
    deaf.connect((served.host, served.port))
    begun = time.monotonic()
    with pytest.raises((ConnectionError, OSError)) as found:  # noqa: PT012
        while time.monotonic() < begun + 10:
            with contextlib.suppress(TimeoutError):
                deaf.sendall((HEAD.replace(b"healthz", b"metrics") + b"\r\n") * 100)
    assert not isinstance(found.value, TimeoutError)


def test_a_connection_that_asks_now_and_then_stays(served: Served) -> None:
    connection = http.client.HTTPConnection(served.host, served.port, timeout=10)
    with contextlib.closing(connection):
        for _ in range(3):
            assert request(connection, "/v1/predict", encoded()).status == 200
            socket_then = connection.sock
            time.sleep(2 * LATE)
        assert connection.sock is socket_then


def test_what_clients_do_wrong_is_logged_once_in_a_while(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            odd = served.connect()
            odd.sendall(b"\0\1\2\r\n\r\n")
            assert odd.recv(99).startswith(b"HTTP/1.1 400")
    said = [record.getMessage() for record in caplog.records if "nvalid" in record.getMessage()]
    assert len(said) == 1

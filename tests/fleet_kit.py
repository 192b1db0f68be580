"""A fleet repository of real keys, for tests: `made` is empty, `served` is on a real HTTP server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tuf.ngclient import Updater

from sdlora_edge.fleet.founding import RoleKeys, Setup
from sdlora_edge.fleet.online import OnlineKeys
from sdlora_edge.fleet.repository import Repository
from sdlora_edge.fleet.roles import OFFLINE, ROLES
from sdlora_edge.formats.signing import load_public, new_key


@dataclass
class Clock:
    """Unix seconds that a test sets."""

    now: float = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Made:
    """A repository and its keys. keys: the private key files of each role."""

    repository: Repository
    keys: dict[str, list[Path]]
    online: OnlineKeys

    @property
    def path(self) -> Path:
        return self.repository.path

    @property
    def root(self) -> bytes:
        """The first root, which devices trust."""
        return (self.path / "metadata" / "1.root.json").read_bytes()

    @property
    def targets_keys(self) -> list[Path]:
        return self.keys["targets"]


def made(folder: Path, clock: Callable[[], float], counts: dict[str, int] | None = None) -> Made:
    """An empty repository in `folder`/repository. counts: keys of a role, all of which must sign."""
    keys: dict[str, list[Path]] = {}
    trust: dict[str, RoleKeys] = {}
    for role in ROLES:
        count = (counts or {}).get(role, 1)
        at = folder / "keys" / ("offline" if role in OFFLINE else "online")
        pairs = [new_key(role if count == 1 else f"{role}-{i + 1}", at) for i in range(count)]
        keys[role] = [private for private, _ in pairs]
        trust[role] = RoleKeys([load_public(public) for _, public in pairs], count)
    online = OnlineKeys.load(folder / "keys" / "online")
    setup = Setup(trust, [*keys["root"], *keys["targets"]], online)
    return Made(Repository.create(folder / "repository", setup, clock), keys, online)


def client(at: Made, url: str, folder: Path) -> Updater:
    """python-tuf's own client, which begins with the first root and keeps its metadata in `folder`."""
    for name in ("metadata", "targets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Updater(
        str(folder / "metadata"),
        f"{url}/metadata/",
        str(folder / "targets"),
        f"{url}/targets/",
        bootstrap=at.root,
    )


@dataclass
class Server:
    """A static web server. requests: the paths that clients asked for."""

    url: str
    requests: list[str] = field(default_factory=list)


class _Quiet(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, server_log: list[str], **rest: Any) -> None:
        self.server_log = server_log
        super().__init__(*args, **rest)

    def log_request(self, *args: object) -> None:
        self.server_log.append(self.path)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(path: Path) -> Iterator[Server]:
    """Serve a folder on 127.0.0.1."""
    requests: list[str] = []
    handler = partial(_Quiet, directory=str(path), server_log=requests)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_address[1]}", requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


AMQTT = """
import asyncio, sys
from amqtt.broker import Broker
anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
listener = {"type": "tcp", "bind": "127.0.0.1:" + sys.argv[1]}
async def serve():
    await Broker({"listeners": {"default": listener}, "plugins": anonymous}).start()
    await asyncio.Event().wait()
asyncio.run(serve())
"""
"""A broker of the pip package at the port of its argument: it knows MQTT 3.1.1 alone."""

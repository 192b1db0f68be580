"""`device run`: one process that follows updates, serves predictions, and reports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..device.answers import BATCH
from ..device.device import Device
from ..device.store import store_around
from ..device.watch.events import NOTIFY, Emit, notify
from ..errors import InputError, SdloraError, UsageError
from ..fleet.closing import Closing
from ..fleet.doors import Door, Server, access_of, configured, url_of
from ..inputs.sizes import MAX_PIXELS
from ..results import Served
from .batching import Batcher, Limits, OnAnswer
from .bodies import BODY, Bodies
from .held import Held, Unserved
from .http_api import Counter, Gate, application
from .meters import Counting, Meters
from .origin import Source
from .room import Room, give_back

if TYPE_CHECKING:
    from .updating import Updating

PATIENCE = 30
"""seconds that requests have to end after SIGTERM"""
KEEP_ALIVE = 75
"""seconds that a connection may be idle: a camera that asks now and then keeps its own"""
SOCKET_MODE = 0o660


@dataclass(frozen=True)
class Serving:
    """How predictions are served.

    Attributes:
        door: Where the agent listens, and who may ask. None: at `socket` alone.
        socket: A path to listen at too.
        name: Of the model, in the Open Inference Protocol.
        limits: What may wait.
        batch: Images that are computed together, at most.
        pixels: Of an image, at most.
        body: Bytes of a request, at most.
        memory: Megabytes that the process may take. None: what is usual.
        threads: Of the engine; 0: its own choice.
        page: Folder of static files to serve beside them.
    """

    door: Door | None = field(default_factory=Door)
    socket: Path | None = None
    name: str = "sdlora-edge"
    limits: Limits = field(default_factory=Limits)
    batch: int = BATCH
    pixels: int = MAX_PIXELS
    body: int = BODY
    memory: int | None = None
    threads: int = 0
    page: Path | None = None

    def __post_init__(self) -> None:
        if self.door is None and self.socket is None:
            raise UsageError("the agent listens nowhere: give --listen HOST:PORT or --socket PATH")
        if self.page is not None and not self.page.is_dir():
            raise UsageError(f"--page {self.page} is no folder: give the folder of the page")


class Agent(Closing):
    """A served store.

    Args:
        store: The device's directory.
        serving: How predictions are served.
        source: Where updates come from.
        emit: Gets each event.

    Attributes:
        batcher: Answers images.
        on_answer: Each is called after each answer, off the path of requests, with the image as it
            was submitted and its answer. Whatever it raises is logged.

    Raises:
        InputError: `store` is not a store.
        UsageError: The options do not fit together.
    """

    def __init__(self, store: Path, serving: Serving, source: Source, emit: Emit) -> None:
        self._store, self._serving, self._source = store, serving, source
        self._access = access_of(serving.door or Door())
        self._counting = Counting()
        self._meters = Meters(self._counting, lambda: self.device)
        self._emit = self._meters.counted(emit)
        self._room = Room(serving.memory, serving.batch, serving.pixels)
        self._updating: Updating | None = None
        self._failure: SdloraError | None = None
        self._server: Server | None = None
        # systemd hears from this thread alone, not from the watcher's
        self._systemd = os.environ.pop(NOTIFY, "")
        self._listens, self._served = False, Served(0, 0)
        self.on_answer: list[OnAnswer] = []
        self._held = Held(store, serving.threads, self._checked, self._opened, self._look)
        self.batcher = Batcher(
            lambda: self.device, serving.limits, self.on_answer, self._room, self._counting.note
        )

    @property
    def device(self) -> Device:
        """The device that serves. Raises HealthError while there is none."""
        return self._held.device

    def run(self, ready: Callable[[str], object] | None = None) -> None:
        """Serve until SIGTERM or Ctrl-C; SIGHUP reloads.

        Args:
            ready: Called with each address that the agent listens at.

        Raises:
            InputError: An address cannot be used.
            UsageError: The certificates cannot be used.
            ResourceError: The model does not fit into the memory limit.
        """
        door = self._serving.door
        bodies = Bodies(self._serving.body, lambda: self._room.bodies)
        name, page = self._serving.name, self._serving.page
        counter = Counter(self._held, self.batcher, bodies, self._meters, name, page)
        self._meters.watch(self.batcher)
        self._gate = Gate(application(counter), self._access, self._meters)

        def listens() -> None:
            for address in self._addresses():
                self._emit("serving", {"address": address})
                if ready:
                    ready(address)
            self._listens = True

        with contextlib.ExitStack() as bound:
            local = self._serving.socket
            at = bound.enter_context(_bound(local)) if local else None
            own = [bound.enter_context(_listening(door))] if door else []
            config = configured(door or Door(), self._gate, PATIENCE)
            config.timeout_keep_alive = KEEP_ALIVE
            self._server = Server(config, listens, at)
            if self._failure is None:
                with _called_on(signal.SIGHUP, lambda: self._held.order(self._reload)):
                    self._server.run(own)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Answer what is admitted, end the update that is under way, and count what is left."""
        notify("STOPPING=1", self._systemd)
        self._held.close()
        self.batcher.close()
        if self._updating is not None:
            self._updating.close()
        self._counting.close()
        self._emit("stopped", {})

    def _checked(self, device: Device) -> None:
        """In the thread of the store: the device is open, and does not serve yet."""
        try:
            self._room.opened()
        except SdloraError as error:
            self._failure = error
            if self._server is not None:
                self._server.should_exit = True
            raise

    def _opened(self, device: Device) -> None:
        """In the thread of the store: the device serves."""
        serves = device.serves
        self._emit("opened", {"generation": serves.generation, "task": serves.task})

    def _look(self) -> None:
        """In the thread of the store, every second."""
        self._counting.settle()
        with contextlib.suppress(SdloraError):
            if (serves := self.device.serves) != self._served:
                self._served = serves
                give_back()
            self._room.warn()
        if self._listens:
            notify("READY=1\nWATCHDOG=1", self._systemd)
        if self._updating is None:
            with contextlib.suppress(Unserved):
                self._begin_updates(self.device)

    def _begin_updates(self, device: Device) -> None:
        """Raises SdloraError, such as for a damaged identity: it is tried again."""
        from .updating import Told, Updating  # slow to import: the first answer comes before it

        told = Told(self._emit, self._meters.synced, lambda: self._counting.keep(self._store))
        self._updating = Updating(device, self._store, self._source, told)

    def _reload(self) -> None:
        """SIGHUP: take over new tokens and certificates, and look for updates now."""
        door = self._serving.door
        if door is not None and self._server is not None:
            self._gate.access = access_of(door)
            if self._server.config.ssl is not None and door.cert:
                self._server.config.ssl.load_cert_chain(door.cert, door.key)
        if self._updating is not None:
            self._updating.wake()
        self._emit("reloaded", {})

    def _addresses(self) -> Iterator[str]:
        if self._serving.door is not None and self._server is not None:
            yield url_of(self._serving.door, self._server)
        if self._serving.socket is not None:
            yield f"unix:{self._serving.socket}"


@contextlib.contextmanager
def _listening(door: Door) -> Iterator[socket.socket]:
    """A socket that is bound to the address. Raises InputError."""
    family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
    # with the protocol's number: without it asyncio would not set TCP_NODELAY, and answers on a
    # connection that stays open would be 40 ms late
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((door.host, door.port))
        except OSError as error:
            raise InputError(
                f"--listen {door.host}:{door.port} cannot be used ({error.strerror or error}): "
                "choose another address"
            ) from error
        yield found


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """A socket that is bound to a path, which is removed at the end. Raises InputError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
        if store := store_around(path):
            raise UsageError(f"--socket {path} lies in the store {store}: choose another path")
        try:
            _remove_left_over(path)
            before = os.umask(0o177)
            try:
                found.bind(str(path))
            finally:
                os.umask(before)
            path.chmod(SOCKET_MODE)
        except OSError as error:
            raise InputError(
                f"--socket {path} cannot be used ({error.strerror or error}): choose another path"
            ) from error
        try:
            yield found
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a process that was killed. Raises OSError if one listens at it."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InputError(f"--socket {path} is there and no socket: choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InputError(f"--socket {path} belongs to a process that listens: choose another path")


@contextlib.contextmanager
def _called_on(number: int, call: Callable[[], object]) -> Iterator[None]:
    """A signal calls this inside the block. In another thread than the main one, none does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(number, before)

"""`fleet serve`: the web server, the subscriber and the regular work, until SIGTERM."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from ...errors import SdloraError, UsageError
from .access import LOCAL, Access, CertifiedProtocol, read_token
from .database import DEFAULT, Database
from .inbox import Inbox
from .registry import find_silent, prune
from .views import Settings, Views
from .web import Desk, application

if TYPE_CHECKING:
    from .driving import Driver

log = logging.getLogger("sdlora_edge")
MOST_CONNECTIONS = 500


@dataclass(frozen=True)
class Door:
    """Where the collector listens, and who may come in.

    Attributes:
        host, port: Address.
        token_file: With the token; None to take it from the environment.
        cert, key: Of this server, for TLS.
        client_ca: Certificates of authorities whose clients may look.
    """

    host: str = "127.0.0.1"
    port: int = 8470
    token_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class Upkeep:
    """Work that is done regularly.

    Attributes:
        every: Seconds between two times.
        keep_days: Age at which reports, counts and events are removed.
    """

    every: float = 30
    keep_days: int = 90


@dataclass(frozen=True)
class Service:
    """All of `fleet serve`.

    Attributes:
        broker: URL of an MQTT broker; empty for none.
        driver: Makes what reads and drives the waves of a fleet repository; None for no waves.
    """

    database: str = DEFAULT
    door: Door = field(default_factory=Door)
    settings: Settings = field(default_factory=Settings)
    upkeep: Upkeep = field(default_factory=Upkeep)
    broker: str = ""
    driver: Callable[[Database], Driver] | None = None


def access_of(door: Door) -> Access:
    """Who may look.

    Raises:
        UsageError: Everybody on the network could, or the options of TLS do not fit together.
    """
    access = Access(read_token(door.token_file), door.client_ca is not None)
    if (door.cert is None) != (door.key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both")
    if access.certificates and door.cert is None:
        raise UsageError("--client-ca needs TLS: give --tls-cert and --tls-key too")
    if access.open and not _is_this_machine(door.host):
        raise UsageError(
            f"--host {door.host} lets everybody on the network look: give --token-file, or "
            "--tls-cert, --tls-key and --client-ca"
        )
    return access


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL


def serve(service: Service, ready: Callable[[str], None] | None = None) -> None:
    """Run until SIGTERM or Ctrl-C.

    Args:
        service: What to run.
        ready: Called with the URL when the collector listens.

    Raises:
        UsageError: The options do not fit together.
        InputError: The database, a certificate or the address cannot be used.
    """
    access = access_of(service.door)
    if access.open:
        log.warning("no token and no --client-ca: this collector answers this machine only")
    database = Database.open(service.database)
    with contextlib.closing(database):
        inbox = Inbox(database, time.time)
        driver = service.driver(database) if service.driver else None
        views = Views(database, service.settings, time.time, driver.plans if driver else None)
        server = Server(
            _configured(service.door, application(Desk(views, inbox, access))),
            lambda: ready and ready(_url(service.door, server)),
        )
        with _subscribed(service.broker, inbox), _regular(service, database, driver):
            server.run()


class Server(uvicorn.Server):
    """Tells when it listens, and takes SIGTERM and Ctrl-C as a wish, not as a failure."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn, whose own raises the signals again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _url(door: Door, server: uvicorn.Server) -> str:
    port = server.servers[0].sockets[0].getsockname()[1]
    host = f"[{door.host}]" if ":" in door.host else door.host
    return f"{'https' if door.cert else 'http'}://{host}:{port}"


def _configured(door: Door, app: Any) -> uvicorn.Config:
    tls: dict[str, Any] = {}
    if door.cert and door.key:
        tls = {"ssl_certfile": str(door.cert), "ssl_keyfile": str(door.key)}
    if door.client_ca:
        tls |= {"ssl_ca_certs": str(door.client_ca), "ssl_cert_reqs": ssl.CERT_OPTIONAL}
    config = uvicorn.Config(
        app,
        host=door.host,
        port=door.port,
        http=CertifiedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=5,
        **tls,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"the certificates cannot be used: {error}") from error
    return config


@contextlib.contextmanager
def _subscribed(broker: str, inbox: Inbox) -> Iterator[None]:
    if not broker:
        yield
        return
    from .subscriber import Subscriber

    with Subscriber(broker, inbox):
        yield


@contextlib.contextmanager
def _regular(service: Service, database: Database, driver: Driver | None) -> Iterator[None]:
    """Do the regular work in a thread of its own."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            look(service, database, driver, time.time())
            stop.wait(service.upkeep.every)

    thread = threading.Thread(target=work, name="upkeep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def look(service: Service, database: Database, driver: Driver | None, clock: float) -> None:
    """Do the regular work once. What fails is logged and tried again the next time."""
    tasks: list[Callable[[], object]] = [
        lambda: find_silent(database, clock, service.settings.silent_after),
        lambda: prune(database, clock, service.upkeep.keep_days),
    ]
    if driver:
        tasks.append(lambda: driver.drive(clock))
    for task in tasks:
        try:
            task()
        except SdloraError as error:
            log.error("%s", error)
        except Exception:
            log.exception("the collector's regular work failed")

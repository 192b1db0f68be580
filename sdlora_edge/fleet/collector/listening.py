"""`fleet serve`: the web server, the subscriber and the regular work, until SIGTERM."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import SdloraError
from ..doors import Door, Server, access_of, configured, url_of
from .database import DEFAULT, Database
from .inbox import Inbox
from .registry import find_silent, prune
from .views import Settings, Views
from .web import Desk, application

if TYPE_CHECKING:
    from .driving import Driver

log = logging.getLogger("sdlora_edge")


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
            configured(service.door, application(Desk(views, inbox, access))),
            lambda: ready and ready(url_of(service.door, server)),
        )
        with _subscribed(service.broker, inbox), _regular(service, database, driver):
            server.run()


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

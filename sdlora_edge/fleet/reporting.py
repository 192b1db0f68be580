"""Reports of one device: built, kept until delivered, and sent to every place it reports to.

    STORE/fleet/outbox.json    the newest report that is not delivered everywhere

A device that is offline keeps only the newest: it holds the counts of the whole period (`ledger`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import InputError, SdloraError
from ..formats.canonical import LARGEST, dump_json, parse_exact_json
from ..formats.fields import line, listed, one_of, record, text, whole
from ..results import Result, Status
from ..storage import atomic, disk
from . import ledger
from .closing import Closing
from .identity import MOST_DESTINATIONS, URL_LIMIT, Identity, device_signer, folder_of, locked
from .mqtt_link import PORTS, MqttLink, Options, Session, report_topic, status_topic
from .report import SIZE_LIMIT, Counted, Report, build, seal, surroundings
from .sync_state import NEWEST_ERRORS, Failure, SyncState, last_sync
from .transports import send

log = logging.getLogger(__name__)
OUTBOX, OUTBOX_FORMAT = "outbox.json", "sdlora-edge/outbox/1"
OUTBOX_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Refusal(Result):
    """A place that did not get a report, and why."""

    place: str
    message: str
    exit_code: int


@dataclass(frozen=True)
class Sent(Result):
    """What became of a report.

    Attributes:
        report: What it says, before it was cut to the bytes that a report may have.
        size: Bytes of the sealed report.
        delivered: Places that have it.
        refused: Places that do not; they get the next one.
    """

    report: Report
    size: int
    delivered: tuple[str, ...]
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class Waiting(Result):
    """The newest report that is not delivered everywhere.

    Attributes:
        number: Its number.
        sealed: The sealed report, which is ASCII.
        places: URLs that do not have it yet.
    """

    number: int
    sealed: str
    places: tuple[str, ...]


_OUTBOX = record(
    {
        "format": one_of(OUTBOX_FORMAT),
        "number": whole(1, LARGEST),
        "sealed": text(SIZE_LIMIT),
        "places": listed(line(URL_LIMIT), 1, 2 * MOST_DESTINATIONS),
    }
)


def compose(
    store: Path, who: Identity, status: Status | SdloraError, counted: Counted | None = None
) -> Report:
    """Build a report from what the store says.

    Args:
        store: The device's store.
        who: Its identity.
        status: Its status; or the error because of which it serves nothing.
        counted: Number and predictions. None: as the next report would have them.
    """
    here = surroundings(store)
    sync = last_sync(store)
    if isinstance(status, SdloraError):
        failure = Failure(here.time, status.exit_code, str(status))
        sync = sync or SyncState(here.time)
        sync = replace(sync, errors=(*sync.errors, failure)[-NEWEST_ERRORS:])
    found = counted or ledger.preview(store, here.time)
    return build(None if isinstance(status, SdloraError) else status, who, sync, found, here)


class Reporter(Closing):
    """Sends reports from a process that runs on: connects once, and says whether it is online.

    Use it as a context manager, or call `close`. A place that cannot be reached stops nothing: it
    is logged, and gets the next report.

    Args:
        store: The device's store.
        identity: The device.
        options: How to reach the places. None: as the environment says.
        stays: Whether the process runs on, so that brokers are told whether it is online.
    """

    def __init__(
        self, store: Path, identity: Identity, options: Options | None = None, stays: bool = True
    ) -> None:
        self._store, self._who, self._stays = store, identity, stays
        self._options = options or Options.given()
        self._signer = device_signer(store)
        self._links: dict[str, MqttLink] = {}

    def connect(self) -> None:
        """Connect to the brokers, so that they know that the device is online."""
        for place in self._who.report_to:
            if urlsplit(place).scheme in PORTS:
                with _logged(place):
                    self._link(place)

    def report(self, device_status: Status | SdloraError) -> Sent | None:
        """Report to every place, and log what goes wrong.

        device_status: Of the device, or the error because of which it serves nothing.

        Returns:
            What became of it; None if it could not be made.
        """
        with _logged("a report"):
            return self.report_to(self._who.report_to, device_status)
        return None

    def report_to(self, places: tuple[str, ...], device_status: Status | SdloraError) -> Sent:
        """Report to these places.

        Raises:
            StorageError, ResourceError: The report's number cannot be written.
            InputError: The key or the state of the device cannot be read.
        """
        counted = ledger.begin(self._store, surroundings(self._store).time)
        report = compose(self._store, self._who, device_status, counted)
        sealed = seal(report, self._signer)
        everywhere = tuple(dict.fromkeys((*self._who.report_to, *places)))
        kept = Waiting(report.number, sealed.decode(), everywhere)
        self._keep(kept)
        delivered, refused = self._deliver(sealed, places)
        self._settle(kept, delivered)
        return Sent(report, len(sealed), delivered, refused)

    def retry(self) -> None:
        """Send what is kept to the places that do not have it yet. Log what goes wrong."""
        with _logged("the report that is kept"):
            if (kept := read_outbox(self._store)) is not None:
                delivered, _ = self._deliver(kept.sealed.encode(), kept.places)
                self._settle(kept, delivered)

    def close(self) -> None:
        """Say that the device is offline, and end the connections."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _deliver(
        self, sealed: bytes, places: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
        delivered, refused = [], []
        for place in places:
            try:
                self._send(sealed, place)
                delivered.append(place)
            except SdloraError as error:
                log.warning("a report did not arrive: %s", error)
                refused.append(Refusal(place, **error.to_dict()))
        return tuple(delivered), tuple(refused)

    def _send(self, sealed: bytes, place: str) -> None:
        if self._stays and urlsplit(place).scheme in PORTS:
            self._link(place).publish(report_topic(self._who.channel, self._who.id), sealed)
        else:
            send(sealed, self._who, place, self._options)

    def _link(self, place: str) -> MqttLink:
        """The open connection to a broker, or a new one."""
        if (link := self._links.get(place)) is None or not link.alive:
            if link is not None:
                self._links.pop(place).close()
            who = self._who
            session = Session(f"sdlora-edge-{who.id}", status_topic(who.channel, who.id))
            link = self._links[place] = MqttLink(place, session, self._options)
        return link

    def _keep(self, waiting: Waiting) -> None:
        """Keep a report, unless another process has made a newer one."""
        with locked(self._store):
            kept = read_outbox(self._store)
            if kept is None or kept.number < waiting.number:
                _write(self._store, waiting)

    def _settle(self, sent: Waiting, delivered: tuple[str, ...]) -> None:
        """Note where a report arrived. The period ends once every place has it."""
        left = tuple(place for place in sent.places if place not in delivered)
        if not left:
            # First the period ends. After a cut before the outbox is removed, the same report is
            # sent again; its readers know it by its number.
            ledger.delivered(self._store, sent.number)
        with locked(self._store):
            kept = read_outbox(self._store)
            if kept is not None and kept.number == sent.number:
                _write(self._store, replace(sent, places=left))


def _write(store: Path, waiting: Waiting) -> None:
    """Replace what is kept; remove it if no place waits for it."""
    path = folder_of(store) / OUTBOX
    if waiting.places:
        atomic.write(path, dump_json({"format": OUTBOX_FORMAT, **waiting.to_dict()}), like=store)
        return
    with contextlib.suppress(OSError):
        atomic.remove(path)


def read_outbox(store: Path) -> Waiting | None:
    """The newest report that is not delivered everywhere; None if there is none.

    A damaged one counts as none: the next report holds all that it held.
    """
    path = folder_of(store) / OUTBOX
    with atomic.reading(path):
        if disk.size(path) is None:
            return None
    try:
        value = parse_exact_json(atomic.read(path, OUTBOX_LIMIT), str(path))
        _OUTBOX(value)
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return Waiting(value["number"], value["sealed"], tuple(value["places"]))


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except SdloraError as error:
        log.warning("%s: %s", what, error)

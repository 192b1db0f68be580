"""Takes reports from an MQTT broker.

sdlora-edge/<channel>/<device id>/report    sealed reports, retained
sdlora-edge/<channel>/<device id>/status    online or offline, retained; the device's last will
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from ...errors import InputError, SdloraError, UsageError
from ..mqtt_link import (
    CLOSED,
    KEEP_ALIVE,
    OFFLINE,
    ONLINE,
    OTHER_VERSION,
    PASSWORD,
    PORTS,
    TOPICS,
    Options,
)
from ..report import SIZE_LIMIT
from .inbox import TOO_LARGE, Inbox
from .registry import set_online

log = logging.getLogger("sdlora_edge")
KEPT = 7 * 24 * 3600
"""Seconds for which the broker keeps what arrives while the collector is away."""
ANSWER = 5.0
"""Seconds for a broker to answer; one that knows no MQTT 5 may say nothing."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts to connect, at most."""


class Subscriber:
    """Passes reports from a broker to an inbox, in a thread; connects again by itself.

    It speaks MQTT 5, and 3.1.1 with a broker that does not know 5.

    Attributes:
        connected: Whether it is connected now.
    """

    def __init__(self, url: str, inbox: Inbox, options: Options | None = None) -> None:
        """Prepare; `with` starts it.

        Args:
            url: mqtt://[user@]host[:port], or mqtts:// for TLS. The password is in the environment
                variable SDLORA_EDGE_MQTT_PASSWORD.
            inbox: Gets the reports.
            options: Certificates. None: those that the environment names.

        Raises:
            UsageError: The URL is malformed, or holds a password.
            InputError: The certificates cannot be used.
        """
        self._parts = _parsed(url)
        self._options = options or Options.given()
        self._inbox = inbox
        self._name = _client_name(inbox)
        self._versions = [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311]
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._answer: str | None = None
        self._told = ""
        self.connected = False
        self._new_client(self._versions[0])  # so that wrong certificates are told at once
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)

    def __enter__(self) -> Subscriber:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        with self._news:
            self._news.notify_all()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        wait = 1.0
        while not self._stop.is_set():
            wait = 1.0 if self._connect_once() else min(2 * wait, LONGEST_WAIT)
            self._stop.wait(wait)

    def _connect_once(self) -> bool:
        """Connect, and stay until the connection ends. Returns whether there was one."""
        for version in self._versions:
            client, self._answer = self._new_client(version), None
            try:
                client.connect(*self._address(), keepalive=KEEP_ALIVE, **_session(version))
            except (OSError, ValueError) as error:
                self._tell(f"the broker cannot be reached ({error})")
                return False
            client.loop_start()
            with self._news:
                self._news.wait_for(self._is_answered, ANSWER)
                good = self._answer == ""
                if good:
                    self._tell("")
                    self._versions = [version]
                    self._news.wait_for(lambda: self._stop.is_set() or not self.connected)
            client.disconnect()
            client.loop_stop()
            self.connected = False
            if good or self._stop.is_set():
                return good
            if self._answer not in OTHER_VERSION:
                break
        self._tell(f"the broker refuses the collector ({self._answer or 'no answer'})")
        return False

    def _is_answered(self) -> bool:
        return self._answer is not None or self._stop.is_set()

    def _tell(self, trouble: str) -> None:
        """Log trouble once, not with each attempt."""
        if trouble and trouble != self._told:
            log.warning("%s: trying again", trouble)
        self._told = trouble

    def _address(self) -> tuple[str, int]:
        return str(self._parts.hostname), self._parts.port or PORTS[self._parts.scheme]

    def _new_client(self, version: MQTTProtocolVersion) -> mqtt.Client:
        old = version is MQTTProtocolVersion.MQTTv311
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._name,
            protocol=version,
            clean_session=False if old else None,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._options.timeout
        if self._parts.username:
            client.username_pw_set(unquote(self._parts.username), os.environ.get(PASSWORD))
        if self._parts.scheme == "mqtts":
            files = self._options.ca, self._options.certificate, self._options.key
            try:
                client.tls_set(*files)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"the certificates for the broker cannot be used ({error}): check the files "
                    "that SDLORA_EDGE_CA and SDLORA_EDGE_CLIENT_CERT name"
                ) from error
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        return client

    def _on_connect(
        self, client: mqtt.Client, data: Any, flags: Any, code: Any, properties: Any
    ) -> None:
        if not code.is_failure:
            client.subscribe([(f"{TOPICS}/+/+/report", 1), (f"{TOPICS}/+/+/status", 1)])
        with self._news:
            self.connected = not code.is_failure
            self._answer = str(code) if code.is_failure else ""
            self._news.notify_all()

    def _on_disconnect(
        self, client: mqtt.Client, data: Any, flags: Any, code: Any, properties: Any
    ) -> None:
        with self._news:
            self.connected = False
            self._answer = CLOSED if self._answer is None else self._answer
            self._news.notify_all()

    def _on_message(self, client: mqtt.Client, data: Any, message: mqtt.MQTTMessage) -> None:
        """Nothing that arrives may end the thread."""
        try:
            self._take(message)
        except SdloraError as error:
            log.error("a report from the broker is lost: %s", error)
        except Exception:
            log.exception("a message of the broker could not be handled")

    def _take(self, message: mqtt.MQTTMessage) -> None:
        _, _, device, kind = message.topic.split("/")
        payload = bytes(message.payload)
        if kind == "status":
            if payload.decode("ascii", "replace") in (ONLINE, OFFLINE):
                set_online(self._inbox.database, device, payload == ONLINE.encode())
        elif len(payload) > SIZE_LIMIT:
            self._inbox.count(TOO_LARGE)
        elif payload:  # an empty one removes what the broker keeps
            done = self._inbox.take(payload, again=message.retain)
            if done.reason:
                log.debug("%s: %s", message.topic, done.reason)


def _session(version: MQTTProtocolVersion) -> dict[str, Any]:
    """What makes the broker keep reports while the collector is away; 3.1.1 does so anyway."""
    if version is MQTTProtocolVersion.MQTTv311:
        return {}
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = KEPT
    return {"clean_start": False, "properties": properties}


def _parsed(url: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"--broker {url!r} is not a URL: {error}") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise UsageError(f"--broker {url!r}: use mqtt://HOST or mqtts://HOST")
    if parts.password is not None:
        raise UsageError(f"--broker: every user would see the password: set {PASSWORD} instead")
    return parts


def _client_name(inbox: Inbox) -> str:
    """One name for each database, so that the broker knows the collector after a restart."""
    url = inbox.database.engine.url.render_as_string(hide_password=True)
    place = f"{socket.gethostname()}\n{Path.cwd()}\n{url}"
    return f"sdlora-edge-{hashlib.sha256(place.encode()).hexdigest()[:10]}"

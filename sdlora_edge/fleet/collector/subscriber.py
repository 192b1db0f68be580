"""Takes reports from an MQTT broker.

sdlora-edge/<channel>/<device id>/report    sealed reports, retained
sdlora-edge/<channel>/<device id>/status    online or offline, retained; the device's last will
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from sqlalchemy.exc import SQLAlchemyError

from ...errors import SdloraError, UsageError
from ..report import SIZE_LIMIT
from .inbox import TOO_LARGE, Inbox
from .registry import set_online

log = logging.getLogger("sdlora_edge")
PASSWORD = "SDLORA_EDGE_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
CA = "SDLORA_EDGE_MQTT_CA"
REPORTS, STATUSES = "sdlora-edge/+/+/report", "sdlora-edge/+/+/status"
KEPT = 7 * 24 * 3600
"""Seconds for which the broker keeps what arrives while the collector is away."""
PORTS = {"mqtt": 1883, "mqtts": 8883}


class Subscriber:
    """Passes reports from a broker to an inbox, in a thread; connects again by itself.

    It speaks MQTT 5, and MQTT 3.1.1 to a broker that knows no other.

    Attributes:
        connected: Whether it is connected now.
    """

    def __init__(self, url: str, inbox: Inbox) -> None:
        """Prepare; `with` starts it.

        Args:
            url: mqtt://[user@]host[:port], or mqtts:// for TLS. The password is in the environment
                variable SDLORA_EDGE_MQTT_PASSWORD. SDLORA_EDGE_MQTT_CA names a file with the
                certificate authority of the broker, if the system does not know it.

        Raises:
            UsageError: The URL is malformed, or holds a password.
        """
        self._parts = _parsed(url)
        self._inbox = inbox
        self.connected = False
        self._name = _client_name(inbox)
        self._client = self._make(MQTTProtocolVersion.MQTTv5)

    def __enter__(self) -> Subscriber:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _make(self, protocol: MQTTProtocolVersion) -> mqtt.Client:
        old = protocol is MQTTProtocolVersion.MQTTv311
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._name,
            protocol=protocol,
            clean_session=False if old else None,
        )
        if self._parts.username:
            client.username_pw_set(unquote(self._parts.username), os.environ.get(PASSWORD))
        if self._parts.scheme == "mqtts":
            client.tls_set(ca_certs=os.environ.get(CA) or None)
        client.reconnect_delay_set(1, 60)
        client.on_connect = self._connected
        client.on_connect_fail = self._unreachable
        client.on_disconnect = self._disconnected
        client.on_message = self._arrived
        return client

    def _start(self) -> None:
        port = self._parts.port or PORTS[self._parts.scheme]
        options: dict[str, Any] = {}
        if self._client.protocol is MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = KEPT
            options = {"clean_start": False, "properties": properties}
        self._client.connect_async(self._parts.hostname or "", port, **options)
        self._client.loop_start()

    def _connected(
        self, client: mqtt.Client, data: Any, flags: Any, code: Any, properties: Any
    ) -> None:
        if code.is_failure:
            log.warning("the broker refuses the collector: %s", code)
            return
        self.connected = True
        client.subscribe([(REPORTS, 1), (STATUSES, 1)])

    def _unreachable(self, client: mqtt.Client, data: Any) -> None:
        log.warning("the broker %s cannot be reached: trying again", self._parts.hostname)

    def _disconnected(
        self, client: mqtt.Client, data: Any, flags: Any, code: Any, properties: Any
    ) -> None:
        if self.connected and code.is_failure:
            log.warning("the connection to the broker was lost (%s): trying again", code)
        self.connected = False

    def _arrived(self, client: mqtt.Client, data: Any, message: mqtt.MQTTMessage) -> None:
        """Nothing that arrives may end the thread."""
        try:
            self._take(message)
        except (SdloraError, SQLAlchemyError) as error:
            log.error("a report from the broker is lost: %s", error)
        except Exception:
            log.exception("a message of the broker could not be handled")

    def _take(self, message: mqtt.MQTTMessage) -> None:
        _, _, device, kind = message.topic.split("/")
        if kind == "status":
            if message.payload in (b"online", b"offline"):
                set_online(self._inbox.database, device, message.payload == b"online")
        elif len(message.payload) > SIZE_LIMIT:
            self._inbox.count(TOO_LARGE)
        elif message.payload:  # an empty one removes what the broker keeps
            done = self._inbox.take(bytes(message.payload), again=message.retain)
            if done.reason:
                log.debug("%s: %s", message.topic, done.reason)


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

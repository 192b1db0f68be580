"""A connection to an MQTT broker: publishes, and waits until the broker has confirmed.

It speaks MQTT 5, and 3.1.1 with a broker that does not know 5.

TLS with the system's authorities or `--ca`, a client certificate, or a user and a password. After
an error the connection is closed and nothing waits in a queue: the caller makes a new one, and
sends its newest report.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..errors import InputError, LinkError, UsageError
from .closing import Closing
from .extras import need

if TYPE_CHECKING:
    from paho.mqtt.client import Client
    from paho.mqtt.reasoncodes import ReasonCode

PASSWORD = "SDLORA_EDGE_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
PORTS = {"mqtt": 1883, "mqtts": 8883}
CERTIFICATES = "SDLORA_EDGE_CA", "SDLORA_EDGE_CLIENT_CERT", "SDLORA_EDGE_CLIENT_KEY"
"""Variables with the files of `Options`."""
TOPICS = "sdlora-edge"
ONLINE, OFFLINE = "online", "offline"
CLOSED = "it closed the connection"
OTHER_VERSION = "Unsupported protocol version", CLOSED, None
"""what a broker says, or does, that does not know MQTT 5; None: it waits for bytes that 5 lacks"""
KEEP_ALIVE = 60
"""seconds between signs of life; a broker publishes the last will after one and a half of them"""


@dataclass(frozen=True)
class Options:
    """How to reach a place that takes reports.

    Attributes:
        ca: PEM file with the authorities to trust. None: those of the system.
        certificate: PEM file with the client's certificate. None: it has none.
        key: PEM file with the key of the certificate. None: it is in the same file.
        timeout: Seconds to wait for an answer.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    timeout: float = 30.0

    @classmethod
    def given(
        cls, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
    ) -> Options:
        """These files; in place of a missing one, that of the environment."""
        found = [
            str(file) if file else os.environ.get(name) or None
            for file, name in zip((ca, certificate, key), CERTIFICATES, strict=True)
        ]
        return cls(found[0], found[1], found[2])


def report_topic(channel: str, device: str) -> str:
    """Topic of a device's reports."""
    return f"{TOPICS}/{channel}/{device}/report"


def status_topic(channel: str, device: str) -> str:
    """Topic that says whether a device is connected: ONLINE, or OFFLINE."""
    return f"{TOPICS}/{channel}/{device}/status"


@dataclass(frozen=True)
class Session:
    """Who connects.

    Attributes:
        client: Client id. A broker ends the older connection of the same id.
        will: Topic of the status; empty if this connection says nothing about being online.
    """

    client: str
    will: str = ""


class MqttLink(Closing):
    """An open connection.

    Raises:
        LinkError: The broker cannot be reached.
        InputError: It refuses, or the certificates cannot be used.
    """

    def __init__(self, url: str, session: Session, options: Options) -> None:
        self._mqtt = need("paho.mqtt.client", "agent")
        parts = urlsplit(url)
        self._secure, self._user = parts.scheme == "mqtts", parts.username
        self._address = str(parts.hostname), parts.port or PORTS[parts.scheme]
        self._place = f"{parts.scheme}://{self._address[0]}:{self._address[1]}"
        self._session, self._options = session, options
        self._news = threading.Condition()
        self._answer: str | None = None
        """of the broker: None before it, empty if it accepts, else why it does not"""
        self._confirmed: dict[int, ReasonCode] = {}
        self._open()
        if session.will:
            self.publish(session.will, ONLINE.encode())

    def publish(self, topic: str, payload: bytes, retain: bool = True) -> None:
        """Publish a message, and wait until the broker has it.

        retain: The broker keeps it for whoever subscribes later.

        Raises:
            LinkError: The broker does not confirm in time. The link is closed.
            InputError: The broker refuses. The link is closed.
        """
        try:
            sent = self._client.publish(topic, payload, qos=1, retain=retain)
            with self._news:
                done = self._news.wait_for(
                    lambda: sent.mid in self._confirmed, self._options.timeout
                )
            if not done:
                raise LinkError(
                    f"{self._place} did not confirm a message within {self._options.timeout:g} s: "
                    "check the network and the broker"
                )
            if (code := self._confirmed.pop(sent.mid)).is_failure:
                raise InputError(
                    f"{self._place} refused a message on {topic} ({code}): let this device "
                    "publish there"
                )
        except ValueError as error:
            raise UsageError(f"{topic} is no topic for {self._place}: {error}") from error
        except (InputError, LinkError):
            self._end()
            raise

    @property
    def alive(self) -> bool:
        """Whether it is connected."""
        return bool(self._client.is_connected())

    def close(self) -> None:
        """Say OFFLINE if this connection said ONLINE, and end it."""
        try:
            if self._session.will and self.alive:
                self.publish(self._session.will, OFFLINE.encode())
        except (InputError, LinkError):  # then the broker publishes the last will
            return
        self._end()

    def _open(self) -> None:
        """Connect. Raises LinkError and InputError."""
        for protocol in (self._mqtt.MQTTv5, self._mqtt.MQTTv311):
            self._answer = None
            self._client = self._new_client(protocol)
            try:
                self._client.connect(*self._address, keepalive=KEEP_ALIVE)
            except (OSError, ValueError) as error:
                raise LinkError(
                    f"{self._place} cannot be reached ({error}): check the network and the broker"
                ) from error
            self._client.loop_start()
            with self._news:
                self._news.wait_for(lambda: self._answer is not None, self._options.timeout)
            if self._answer == "":
                return
            self._end()
            if self._answer not in OTHER_VERSION:
                break
        if self._answer in (None, CLOSED):
            said = self._answer or f"no answer within {self._options.timeout:g} s"
            raise LinkError(
                f"{self._place} did not connect ({said}): check the network and the broker"
            )
        raise InputError(
            f"{self._place} refused the connection ({self._answer}): check the user in the URL, "
            f"{PASSWORD} and the certificates"
        )

    def _new_client(self, protocol: Any) -> Client:
        version = need("paho.mqtt.enums", "agent").CallbackAPIVersion.VERSION2
        client: Client = self._mqtt.Client(
            version, client_id=self._session.client, protocol=protocol
        )
        client.connect_timeout = self._options.timeout
        if self._user:
            client.username_pw_set(unquote(self._user), os.environ.get(PASSWORD))
        if self._secure:
            self._encrypt(client)
        if self._session.will:
            client.will_set(self._session.will, OFFLINE, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

    def _encrypt(self, client: Client) -> None:
        o = self._options
        try:
            client.tls_set(o.ca, o.certificate, o.key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError(
                f"the certificates for {self._place} cannot be used ({error}): check --ca, "
                "--client-cert and --client-key"
            ) from error

    def _end(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, client: Client, data: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        if not code.is_failure and self._answer == "" and self._session.will:
            # Connected again after a loss, when the broker published the last will.
            client.publish(self._session.will, ONLINE, qos=1, retain=True)
        self._answered(str(code) if code.is_failure else "")

    def _on_disconnect(
        self, client: Client, data: Any, flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        self._answered(CLOSED)

    def _answered(self, answer: str) -> None:
        with self._news:
            if self._answer is None:
                self._answer = answer
                self._news.notify_all()

    def _on_publish(
        self, client: Client, data: Any, mid: int, code: ReasonCode, properties: Any
    ) -> None:
        with self._news:
            self._confirmed[mid] = code
            self._news.notify_all()

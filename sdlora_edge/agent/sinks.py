"""Where answers go: stdout, an MQTT broker or a webhook, as one JSON document for each.

    {"time": "2026-11-29T10:00:00.123+00:00", "source": "rtsp://camera/1", "known": true, ...}

The rest is what `Prediction.to_dict` says, or {"error": {"message", "exit_code"}}. No document
holds an image. Each place has a thread and a queue: one that is slow or cannot be reached loses its
oldest answers, and holds up neither the camera nor the other places.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import sys
import threading
import time
from abc import abstractmethod
from collections import deque
from datetime import datetime, timezone
from typing import Union
from urllib.parse import unquote, urlsplit

from ..device.answers import Prediction
from ..errors import InputError, LinkError, SdloraError, UsageError
from ..fleet.closing import Closing
from ..fleet.extras import need
from ..fleet.mqtt_link import PORTS, MqttLink, Options, Session
from ..fleet.transports import Poster
from .sources import Frame, without_password

log = logging.getLogger("sdlora_edge")
STDOUT = "-"
TOKEN = "SDLORA_EDGE_ANSWERS_TOKEN"  # noqa: S105 - the name of a variable
WAITING = 1000
"""answers that wait for one place"""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""seconds before the next try, after the first failure and at most"""
FLUSH = 2.0
"""seconds that `close` gives the answers that still wait"""
Outcome = Union[Prediction, SdloraError]


def document(frame: Frame, outcome: Outcome) -> bytes:
    """The JSON document of an answer, on one line."""
    moment = datetime.fromtimestamp(frame.time, timezone.utc).isoformat(timespec="milliseconds")
    facts = outcome.to_dict() if isinstance(outcome, Prediction) else {"error": outcome.to_dict()}
    head = {"time": moment, "source": frame.source}
    text = json.dumps({**head, **facts}, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="replace")  # the name of a file may be no text


class Sink(Closing):
    """A place that takes answers. Use it as a context manager, or call `close`.

    Attributes:
        name: The place, without a password.
        sent: Number of answers that arrived.
        dropped: Number of answers that were lost: the place refused them, or too many waited.
    """

    def __init__(self, name: str) -> None:
        self.name, self.sent, self.dropped = name, 0, 0
        self._put = 0
        self._waiting: deque[bytes] = deque()
        self._news = threading.Condition()
        self._end: float | None = None
        """the time at which `close` gives up; None while it is open"""
        self._thread = threading.Thread(target=self._run, name=f"answers to {name}", daemon=True)
        self._thread.start()

    def put(self, answer: bytes) -> None:
        """Send a document, some time. Never waits."""
        with self._news:
            if len(self._waiting) >= WAITING:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(answer)
            self._put += 1
            self._news.notify_all()

    def close(self) -> None:
        """Send what waits, for at most FLUSH seconds; drop the rest."""
        with self._news:
            self._end = time.monotonic() + FLUSH
            self._news.notify_all()
        self._thread.join(FLUSH + 0.5)
        with self._news:
            self._waiting.clear()
            self.dropped = self._put - self.sent  # what is under way counts too
        if self.dropped:
            log.warning("--answers %s: %d answers did not arrive", self.name, self.dropped)

    @abstractmethod
    def _send(self, answer: bytes) -> None:
        """Return once it arrived.

        Raises:
            LinkError: The place cannot be reached: it is tried again.
            SdloraError: The place refuses this answer, which is dropped.
        """

    def _disconnect(self) -> None:
        """End the connection, if there is one."""

    def _run(self) -> None:
        troubles = 0
        while (answer := self._next()) is not None:
            try:
                self._send(answer)
                self.sent += 1
                if troubles:
                    log.warning("--answers %s takes answers again", self.name)
                troubles = 0
            except Exception as error:
                if not troubles:  # a lasting trouble is told once
                    log.warning("--answers %s: %s", self.name, error)
                troubles += 1
                self._missed(answer, isinstance(error, LinkError))
                self._pause(troubles)
        self._disconnect()

    def _next(self) -> bytes | None:
        """The oldest answer, when there is one; None at the end."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._end is not None)
            over = self._end is not None and time.monotonic() > self._end
            return None if over or not self._waiting else self._waiting.popleft()

    def _missed(self, answer: bytes, again: bool) -> None:
        """Put an answer back, unless it is refused or newer ones have taken its place."""
        with self._news:
            if again and len(self._waiting) < WAITING:
                self._waiting.appendleft(answer)
            else:
                self.dropped += 1

    def _pause(self, troubles: int) -> None:
        bound = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(troubles - 1, 10))
        with self._news:
            self._news.wait_for(
                lambda: self._end is not None,
                bound * random.uniform(0.5, 1),  # noqa: S311
            )
            if self._end is not None:  # the next try would come too late
                self._end = min(self._end, time.monotonic())


class ToStdout(Sink):
    """One line for each answer."""

    def __init__(self) -> None:
        # Not through sys.stdout: if this thread hangs in it, Python cannot end.
        self._descriptor = sys.stdout.fileno()
        super().__init__("-")

    def _send(self, answer: bytes) -> None:
        left = answer + b"\n"
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:  # the reader has gone
            raise InputError(f"stdout takes no answer: {error.strerror}") from error


class ToBroker(Sink):
    """Messages on a topic of an MQTT broker, with QoS 1. The broker keeps none of them.

    The password is in SDLORA_EDGE_MQTT_PASSWORD.
    """

    def __init__(self, url: str, options: Options) -> None:
        parts = urlsplit(url)
        self._topic = unquote(parts.path.removeprefix("/"))
        is_filter = "+" in self._topic or "#" in url
        if not parts.hostname or not self._topic or is_filter:
            raise UsageError(
                f"--answers {without_password(url)}: name a broker and a topic, such as "
                "mqtt://broker/line-3/answers"
            )
        need("paho.mqtt.client", "agent")
        self._url, self._options = url, options
        self._client = f"sdlora-edge-answers-{secrets.token_hex(6)}"
        self._link: MqttLink | None = None
        super().__init__(without_password(url))

    def _send(self, answer: bytes) -> None:
        if self._link is None or not self._link.alive:
            self._disconnect()
            self._link = MqttLink(self._url, Session(self._client), self._options)
        self._link.publish(self._topic, answer, retain=False)

    def _disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class ToWebhook(Sink):
    """A POST request for each answer."""

    def __init__(self, url: str, options: Options) -> None:
        if (name := without_password(url)) != url:
            raise UsageError(f"--answers {name}: put the token into {TOKEN}, not into the address")
        self._url, self._poster = url, Poster(options, TOKEN)
        super().__init__(url)

    def _send(self, answer: bytes) -> None:
        status, said = self._poster.post(self._url, answer)
        if 200 <= status < 300:
            return
        kind = LinkError if status >= 500 or status in (408, 429) else InputError
        raise kind(f"it refused an answer ({status}: {said}): check the address, and {TOKEN}")

    def _disconnect(self) -> None:
        self._poster.close()


def sink(place: str, options: Options | None = None) -> Sink:
    """The place of this name: "-", mqtt(s)://[USER@]BROKER[:PORT]/TOPIC or http(s)://HOST/PATH.

    Args:
        place: As a person names it.
        options: How to reach it. None: as the environment says.

    Raises:
        UsageError: There is no such kind of place, or its package is not installed.
    """
    options, scheme = options or Options.given(), urlsplit(place).scheme
    if place == STDOUT:
        return ToStdout()
    if scheme in PORTS:
        return ToBroker(place, options)
    if scheme in ("http", "https"):
        return ToWebhook(place, options)
    raise UsageError(
        f"--answers {place!r} takes no answers: use -, mqtt://BROKER/TOPIC or https://HOST/PATH"
    )

"""Ways of a report out of a device: MQTT, HTTP or a file. Each returns once the report arrived."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import InputError, LinkError, UsageError, printable
from ..storage import atomic
from .closing import Closing
from .extras import need
from .identity import DESTINATIONS, Identity
from .mqtt_link import PORTS, MqttLink, Options, Session, report_topic

log = logging.getLogger(__name__)
TOKEN = "SDLORA_EDGE_REPORT_TOKEN"  # noqa: S105 - the name of a variable
REPORTS_PATH = "/v1/reports"
HELD = 409
"""HTTP status of a collector that has a report with this number"""
ANSWER_LIMIT = 500
"""bytes of an answer that are read"""


def send(sealed: bytes, who: Identity, url: str, options: Options) -> None:
    """Send a sealed report, and wait until it arrived.

    url: `mqtt(s)://[USER@]HOST[:PORT]`, `http(s)://HOST[:PORT][/PATH]`, `file:///PATH` or a path.

    Raises:
        LinkError: The place cannot be reached, or does not answer for now.
        InputError: It refuses.
        StorageError: The file cannot be written.
        UsageError: The URL is of no known kind, or a package of extra `agent` is missing.
    """
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in PORTS:
        # Another id than that of `Reporter`: a broker would end that connection.
        with MqttLink(url, Session(f"sdlora-edge-{who.id}-once"), options) as link:
            link.publish(report_topic(who.channel, who.id), sealed)
    elif scheme in ("http", "https"):
        _post(sealed, url, options)
    elif scheme in ("", "file"):
        path = Path(unquote(urlsplit(url).path) if scheme else url)
        if not str(url) or (scheme and not path.is_absolute()):
            raise UsageError(f"{url!r} names no file: use a path, or file:///PATH")
        atomic.write(path / f"{who.id}.json" if path.is_dir() else path, sealed)
    else:
        raise UsageError(f"{url!r} takes no reports: use {'://, '.join(DESTINATIONS)}:// or a path")


def _post(sealed: bytes, url: str, options: Options) -> None:
    place = url if urlsplit(url).path not in ("", "/") else url.rstrip("/") + REPORTS_PATH
    with Poster(options, TOKEN) as poster:
        status, said = poster.post(place, sealed)
    if status == HELD:
        log.info("%s has this report already: the answer to the first one was lost", place)
    elif not 200 <= status < 300:
        kind = LinkError if status >= 500 or status == 429 else InputError
        raise kind(
            f"{place} refused the report ({status}: {said}): enroll this device there, and set "
            f"{TOKEN} if it asks for a token"
        )


class Poster(Closing):
    """Sends JSON by HTTP POST over connections that it keeps open.

    Args:
        options: How to reach the places.
        token: Name of a variable. If it is set, its value is sent as a bearer token.
    """

    def __init__(self, options: Options, token: str) -> None:
        self._headers = {"Content-Type": "application/json", "User-Agent": "sdlora-edge"}
        if secret := os.environ.get(token):
            self._headers["Authorization"] = f"Bearer {secret}"
        self._errors = need("urllib3.exceptions", "agent").HTTPError, OSError, ValueError
        self._pool = need("urllib3", "agent").PoolManager(
            ca_certs=options.ca,
            cert_file=options.certificate,
            key_file=options.key,
            timeout=options.timeout,
            retries=False,  # a redirection would take the token elsewhere
        )

    def post(self, url: str, body: bytes) -> tuple[int, str]:
        """(HTTP status, the beginning of what the server says, on one line). Raises LinkError."""
        try:
            answer = self._pool.request(
                "POST", url, body=body, headers=self._headers, preload_content=False
            )
            said = answer.read(ANSWER_LIMIT)
            if len(said) == ANSWER_LIMIT:
                answer.close()  # what is left would come before the next answer
            answer.release_conn()
        except self._errors as error:
            raise LinkError(
                f"{url} cannot be reached ({error}): check the network, --ca and the certificates"
            ) from error
        return answer.status, printable(said.decode("utf-8", "replace")).strip()

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

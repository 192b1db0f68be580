"""Ways of a report out of a device: MQTT, HTTP or a file. Each returns once the report arrived."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import InputError, LinkError, UsageError, printable
from ..storage import atomic
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
    http = need("urllib3", "agent")
    errors = need("urllib3.exceptions", "agent")
    headers = {"Content-Type": "application/json", "User-Agent": "sdlora-edge"}
    if token := os.environ.get(TOKEN):
        headers["Authorization"] = f"Bearer {token}"
    place = url if urlsplit(url).path not in ("", "/") else url.rstrip("/") + REPORTS_PATH
    try:
        with http.PoolManager(
            ca_certs=options.ca,
            cert_file=options.certificate,
            key_file=options.key,
            timeout=options.timeout,
            retries=False,  # a redirection would take the token elsewhere
        ) as pool:
            answer = pool.request(
                "POST", place, body=sealed, headers=headers, preload_content=False
            )
            status, said = answer.status, answer.read(ANSWER_LIMIT)
            answer.close()
    except (errors.HTTPError, OSError, ValueError) as error:
        raise LinkError(
            f"{place} cannot be reached ({error}): check the network, --ca and the certificates"
        ) from error
    if status == HELD:
        log.info("%s has this report already: the answer to the first one was lost", place)
    elif not 200 <= status < 300:
        text = printable(said.decode("utf-8", "replace")).strip()
        kind = LinkError if status >= 500 or status == 429 else InputError
        raise kind(
            f"{place} refused the report ({status}: {text}): enroll this device there, and set "
            f"{TOKEN} if it asks for a token"
        )

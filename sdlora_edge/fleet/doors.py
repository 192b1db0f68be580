"""Where a web server of ours listens, and who may come in: `fleet serve` and `device run`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from ..errors import UsageError
from .access import TOKEN, Access, CertifiedProtocol, is_this_machine, read_token
from .hurrying import SELDOM

MOST_CONNECTIONS = 500
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
"""of every page for people"""


@dataclass(frozen=True)
class Door:
    """Where a server listens, and who may come in.

    Attributes:
        host, port: Address.
        token_file: With the token; None to take it from the environment.
        cert, key: Of this server, for TLS.
        client_ca: Certificates of authorities whose clients may look.
        variable: Of the environment, with the token.
        option: That names the address.
        anyone: Let in everybody who reaches the address.
    """

    host: str = "127.0.0.1"
    port: int = 8470
    token_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    variable: str = TOKEN
    option: str = "--host"
    anyone: bool = False


def access_of(door: Door) -> Access:
    """Who may look.

    Raises:
        UsageError: Everybody on the network could, or the options of TLS do not fit together.
    """
    token = read_token(door.token_file, door.variable)
    access = Access(token, door.client_ca is not None, door.anyone)
    if (door.cert is None) != (door.key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both")
    if access.certificates and door.cert is None:
        raise UsageError("--client-ca needs TLS: give --tls-cert and --tls-key too")
    if access.open and not door.anyone and not is_this_machine(door.host):
        raise UsageError(
            f"{door.option} {door.host} lets everybody on the network look: give --token-file, or "
            "--tls-cert, --tls-key and --client-ca"
        )
    return access


class Server(uvicorn.Server):
    """Tells when it listens, and takes SIGTERM and Ctrl-C as a wish, not as a failure.

    Args:
        config: As `configured` makes it.
        ready: Called when the server listens.
        local: A bound socket in the file system to listen at too, without TLS.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], object],
        local: socket.socket | None = None,
    ) -> None:
        super().__init__(config)
        self._ready, self._local = ready, local

    async def startup(self, sockets: Any = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        if not self.started:
            return
        if self._local is not None:
            loop = asyncio.get_running_loop()
            self.servers.append(await loop.create_unix_server(self._protocol, sock=self._local))
        self._ready()

    def _protocol(self) -> CertifiedProtocol:
        return CertifiedProtocol(self.config, self.server_state, self.lifespan.state)

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


def url_of(door: Door, server: uvicorn.Server) -> str:
    """The address that a server listens at."""
    port = server.servers[0].sockets[0].getsockname()[1]
    host = f"[{door.host}]" if ":" in door.host else door.host
    return f"{'https' if door.cert else 'http'}://{host}:{port}"


def configured(door: Door, app: Any, patience: int = 5) -> uvicorn.Config:
    """The server's configuration. patience: seconds that requests have at the end.

    Raises:
        UsageError: The certificates cannot be used.
    """
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
        timeout_graceful_shutdown=patience,
        **tls,
    )
    logging.getLogger("uvicorn.error").addFilter(SELDOM)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"the certificates cannot be used: {error}") from error
    return config

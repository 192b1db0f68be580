"""Who may look: a token, a cookie that a token bought, or a client certificate."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection

from ..errors import UsageError
from .hurrying import HurryingProtocol

TOKEN = "SDLORA_EDGE_FLEET_TOKEN"  # noqa: S105 - the name of a variable
SHORTEST = 16
"""Characters of a token: too long to guess, so that no attempt needs to be counted."""
COOKIE = "sdlora-edge-fleet"
SESSION = 12 * 3600
"""Seconds for which a browser stays logged in."""
CERTIFIED, LOCAL_SOCKET = "client_certificate", "local_socket"
"""what `CertifiedProtocol` knows of a connection"""


@dataclass(frozen=True)
class Access:
    """Decides who may look.

    Attributes:
        token: Empty if there is none.
        certificates: Clients with a certificate of the given authority may look.
        anyone: If there is neither: everybody on the network may look.
    """

    token: str = ""
    certificates: bool = False
    anyone: bool = False

    @property
    def open(self) -> bool:
        """Whether everybody who reaches the server may look."""
        return not self.token and not self.certificates

    def allows(self, connection: HTTPConnection, clock: float) -> bool:
        """Whether a request may see more than the server's health."""
        if connection.scope.get("state", {}).get(LOCAL_SOCKET):
            return True
        if self.open:
            return self.anyone or _is_local_name(connection.headers.get("host", ""))
        if self.certificates and connection.scope.get("state", {}).get(CERTIFIED):
            return True
        if not self.token:
            return False
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        return self.is_session(connection.cookies.get(COOKIE, ""), clock)

    def is_token(self, given: str) -> bool:
        """Compare in constant time."""
        return bool(self.token) and _same(given, self.token)

    def session(self, clock: float) -> str:
        """The value of a cookie that is good for SESSION seconds."""
        end = str(int(clock) + SESSION)
        return f"{end}.{self._seal(end)}"

    def is_session(self, given: str, clock: float) -> bool:
        """Whether a cookie is ours and not too old."""
        end, _, seal = given.partition(".")
        good = _same(seal, self._seal(end))
        return good and end.isascii() and end.isdigit() and int(end) > clock

    def _seal(self, end: str) -> str:
        key = hashlib.sha256(b"sdlora-edge session\n" + self.token.encode()).digest()
        return hmac.new(key, end.encode(errors="replace"), "sha256").hexdigest()


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def _is_local_name(host: str) -> bool:
    """A page elsewhere whose name was made to lead here (DNS rebinding) sends its own name."""
    name = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    return is_this_machine(name.strip("[]"))


def is_this_machine(host: str) -> bool:
    """Whether a name or address leads to this machine, whoever resolves it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path | None, variable: str = TOKEN) -> str:
    """The token, from a file or else a variable of the environment; empty if there is none.

    Raises:
        UsageError: It cannot be read, is too short, or holds a space.
    """
    where = str(path) if path else variable
    try:
        token = path.read_text(encoding="utf-8").strip() if path else os.environ.get(variable, "")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {path} cannot be read: {error}") from error
    if (path or token) and (
        len(token) < SHORTEST or not token.isascii() or not token.isprintable()
    ):
        raise UsageError(
            f"the token in {where} has {len(token)} characters: use at least {SHORTEST} plain "
            "ones, such as those that `openssl rand -hex 32` prints"
        )
    return token


class CertifiedProtocol(HurryingProtocol):
    """HTTP that tells the application whether the client showed a certificate.

    TLS has checked it. Clients without one are let in too, for they may ask for the health. Who may
    connect to a socket in the file system is a matter of its mode, and needs no token.
    """

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        found: Callable[[str], ssl.SSLObject | None] = transport.get_extra_info
        tls, plain = found("ssl_object"), transport.get_extra_info("socket")
        self.app_state = {
            **self.app_state,
            CERTIFIED: bool(tls and tls.getpeercert()),
            LOCAL_SOCKET: plain is not None and plain.family == socket.AF_UNIX,
        }
        super().connection_made(transport)

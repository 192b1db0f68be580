"""`device sync`, and what `device init` and `device watch` do with `--from`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UsageError
from . import arguments
from .output import Json, emit

if TYPE_CHECKING:
    from ..device.device import Device
    from ..fleet.client import Synced
    from ..fleet.fetching import Link

PANEL = "Link"
From = Annotated[
    Optional[str],
    typer.Option("--from", metavar="URL", help="URL of a fleet repository, or file://FOLDER."),
]
Root = Annotated[
    Optional[Path],
    typer.Option(
        "--root",
        metavar="FILE",
        help="The repository's 1.root.json, from a place that you trust. Needed once.",
    ),
]
MaxRate = Annotated[
    int,
    typer.Option(
        "--max-rate",
        metavar="BYTES",
        min=0,
        help="Most bytes a second to download. 0 sets no limit.",
        rich_help_panel=PANEL,
    ),
]
Proxy = Annotated[
    Optional[str],
    typer.Option(
        "--proxy",
        metavar="URL",
        help="Proxy to use. Default: the one in the environment (https_proxy).",
        rich_help_panel=PANEL,
    ),
]
Ca = Annotated[
    Optional[Path],
    typer.Option(
        "--ca",
        metavar="FILE",
        help="Certificates to trust in place of the system's, in PEM form.",
        rich_help_panel=PANEL,
    ),
]
ClientCert = Annotated[
    Optional[Path],
    typer.Option(
        "--client-cert",
        metavar="FILE",
        help="Certificate to show to the server, in PEM form.",
        rich_help_panel=PANEL,
    ),
]
ClientKey = Annotated[
    Optional[Path],
    typer.Option(
        "--client-key",
        metavar="FILE",
        help="Private key of the certificate, if it lies in another file.",
        rich_help_panel=PANEL,
    ),
]


def link_of(
    max_rate: int,
    proxy: str | None,
    ca: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
) -> Link:
    """The options of a link as one value."""
    from ..fleet.fetching import Link

    return Link(max_rate, proxy=proxy, ca=ca, client_cert=client_cert, client_key=client_key)


def read_root(path: Path) -> bytes:
    """Read a root of trust. Raises InputError."""
    from ..formats.manifest import FLEET_ROOT_LIMIT
    from ..storage import atomic

    return atomic.receive(path, FLEET_ROOT_LIMIT)


def sync(
    store: arguments.Store,
    url: From = None,
    root: Root = None,
    max_rate: MaxRate = 0,
    proxy: Proxy = None,
    ca: Ca = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    json: Json = False,
) -> None:
    """Look once at a fleet repository, and take the packets that this device may take now.

    Without --from, it is the one that `device configure --url` keeps. The exit code is 0 if there
    is nothing new. If a packet is refused, it is that packet's.
    """
    from ..fleet.client import Client

    client = Client(store, url, link_of(max_rate, proxy, ca, client_cert, client_key))
    if root is not None:
        client.trust(read_root(root))
    done = client.sync()
    emit(done, json, lambda: _told(done))
    if done.failures:
        raise typer.Exit(done.failures[-1].code)


def _told(done: Synced) -> list[str]:
    lines = [f"error: {failure.message}" for failure in done.failures]
    if done.applied:
        lines.append(f"applied {_count(len(done.applied), 'packet')}: task {done.task} in force")
    elif not done.news:
        lines.append("nothing new")
    elif not lines:
        lines.append("nothing to take now")
    if done.state.waiting and not done.failures:
        lines.append(done.state.waiting)
    if done.state.clock_behind:
        lines.append("this device's clock is behind: the repository has signed a later time")
    lines.append(f"{_count(done.requests, 'request')}, {done.received:,} bytes")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def init_from(
    source: tuple[str, Path | None, str | None],
    store: Path,
    link: Link,
    make: Callable[[Path, Path], Device],
) -> Device:
    """Make a store from a bundle in a repository. source: URL, root of trust, bundle."""
    from ..fleet.fetching import Fetcher
    from ..fleet.identity import Changes
    from ..fleet.provision import Source
    from ..fleet.provision import init_from as provisioned
    from ..progress import stage

    url, root, bundle = source
    if root is None:
        raise UsageError(
            "--from needs a root of trust: name the repository's 1.root.json with --root"
        )
    with stage("downloading the bundle"):
        return provisioned(
            Source(url, read_root(root), bundle), store, Fetcher(link), Changes(url=url), make
        )


def follow(
    at: tuple[Path, str | None, Link], every: tuple[float, float], status: Path | None
) -> None:
    """Run until SIGTERM or Ctrl-C.

    at: store, URL and link. every: seconds between two looks, and between two reports.
    """
    from ..fleet.client import Client
    from ..fleet.follow import Follower, Telling, stopped_by_signals
    from ..fleet.mqtt_link import Options

    def make() -> Client:
        return Client(*at)

    make()  # what is wrong with the call is an error of the command
    (store, _, link), (interval, reports) = at, every
    options = Options.given(link.ca, link.client_cert, link.client_key)
    telling = Telling(store, reports, options)
    follower = Follower(make, interval, status, tell=telling)
    with stopped_by_signals(follower), contextlib.closing(telling):
        follower.run()

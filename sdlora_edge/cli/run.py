"""`sdlora-edge device run`: the agent."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import UsageError
from ..inputs.sizes import MAX_PIXELS
from . import arguments, sources, sync
from .output import output, say

_ACCESS, _LIMITS = arguments.ACCESS, "Limits"
TOKEN = "SDLORA_EDGE_AGENT_TOKEN"  # noqa: S105 - the name of a variable


class LogFormat(str, Enum):
    """How events are written."""

    json = "json"
    text = "text"


def run(
    store: arguments.Store,
    url: sync.From = None,
    watch: Annotated[
        Optional[Path],
        typer.Option(
            "--watch", metavar="FOLDER", help="Folder where packets appear, instead of --from."
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to serve predictions at; port 0 takes a free one, off none. Others than "
            "this machine's need a token or mTLS.",
        ),
    ] = "127.0.0.1:8080",
    socket: Annotated[
        Optional[Path],
        typer.Option(
            metavar="PATH",
            help="Unix socket to serve at too. Its user and group may connect, without a token.",
        ),
    ] = None,
    every: Annotated[
        Optional[float],
        typer.Option(
            metavar="SECONDS",
            min=0.01,
            max=86400,
            help="Seconds between two looks for updates. Default: 5 at a folder, 300 at a "
            "repository.",
        ),
    ] = None,
    report_every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=1, help="Seconds between two reports if nothing changes."
        ),
    ] = 3600,
    status: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            callback=output,
            help="JSON file about updates to keep for monitoring. Put it in memory, as in /run.",
        ),
    ] = None,
    model_name: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the model in the Open Inference Protocol.")
    ] = "sdlora-edge",
    page: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Folder of static files to serve as well, such as the page for browsers.",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="How events are written to stderr: json or text.")
    ] = LogFormat.json,
    token_file: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ACCESS,
            help=f"File with the token that clients must send. Default: {TOKEN}.",
        ),
    ] = None,
    tls_cert: arguments.TlsCert = None,
    tls_key: arguments.TlsKey = None,
    client_ca: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ACCESS,
            help="Authorities whose client certificates are let in (PEM).",
        ),
    ] = None,
    anyone: Annotated[
        bool,
        typer.Option(
            "--anyone",
            rich_help_panel=_ACCESS,
            help="Let in everybody who reaches the address, without a token.",
        ),
    ] = False,
    memory_limit: Annotated[
        Optional[int],
        typer.Option(
            metavar="MB",
            min=1,
            rich_help_panel=_LIMITS,
            help="Memory to stay within. Default: the container's limit, or half of the memory.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, rich_help_panel=_LIMITS, help="Most images to answer together."
        ),
    ] = 8,
    queue: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=_LIMITS,
            help="Most images that may wait; also of one request. Beyond it clients get 429.",
        ),
    ] = 64,
    batch_wait: Annotated[
        float,
        typer.Option(
            metavar="MS",
            min=0,
            rich_help_panel=_LIMITS,
            help="Longest time that an image waits for others that are being decoded.",
        ),
    ] = 5,
    max_megapixels: arguments.MaxMegapixels = MAX_PIXELS // 10**6,
    max_body: Annotated[
        int,
        typer.Option(metavar="MB", min=1, rich_help_panel=_LIMITS, help="Refuse larger requests."),
    ] = 16,
    threads: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            rich_help_panel=_LIMITS,
            help="Threads that compute. 0 leaves the number to the engine.",
        ),
    ] = 0,
    max_rate: sync.MaxRate = 0,
    proxy: sync.Proxy = None,
    ca: sync.Ca = None,
    client_cert: sync.ClientCert = None,
    client_key: sync.ClientKey = None,
    camera: sources.Camera = None,
    interval: sources.Interval = 1,
    answers: sources.Answers = None,
    keep_unknown: sources.KeepUnknown = None,
    keep_mb: sources.KeepMb = 100,
    keep_per_day: sources.KeepPerDay = 50,
    blur: sources.Blur = None,
) -> None:
    """Serve predictions over HTTP, take updates, and report, until SIGTERM or Ctrl-C.

    Updates come from a fleet repository (--from, or the one that device configure keeps) or a
    folder (--watch). Those of another process are served too. SIGHUP reads the token and the
    certificates again, and looks for updates.
    """
    from ..fleet.extras import need

    for package in ("starlette", "uvicorn", "prometheus_client", "python_multipart"):
        need(package, "agent")
    from ..agent.agent import Agent, Serving
    from ..agent.attaching import attach
    from ..agent.batching import Limits
    from ..agent.logs import logging_as
    from ..agent.origin import Source
    from ..fleet.doors import Door
    from ..fleet.mqtt_link import Options

    emit = logging_as(log_format.value)
    door = None
    if listen != "off":
        host, port = _address(listen)
        door = Door(host, port, token_file, tls_cert, tls_key, client_ca, TOKEN, "--listen", anyone)
    serving = Serving(
        door=door,
        socket=socket,
        name=model_name,
        limits=Limits(queue, batch_wait / 1000),
        batch=batch_size,
        pixels=max_megapixels * 10**6,
        body=max_body * 10**6,
        memory=memory_limit,
        threads=threads,
        page=page,
    )
    link = sync.link_of(max_rate, proxy, ca, client_cert, client_key)
    source = Source(url, watch, link, every, report_every, status)
    options = Options.given(ca, client_cert, client_key)
    wanted = sources.wanted(camera, interval, answers, keep_unknown, keep_mb, keep_per_day, blur)
    with Agent(store, serving, source, emit) as agent, attach(agent, wanted, options):
        # stdout is for the answers to cameras, if they go there
        agent.run(lambda address: say(f"agent: {address}", err=wanted.to_stdout))


def _address(listen: str) -> tuple[str, int]:
    """HOST:PORT, as one string. Raises UsageError."""
    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise UsageError(f"--listen {listen}: give HOST:PORT, such as 127.0.0.1:8080, or off")
    return host.strip("[]"), int(port)

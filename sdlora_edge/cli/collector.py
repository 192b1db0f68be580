"""`sdlora-edge fleet serve`, `enroll` and `devices`: collect reports and show the fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import arguments
from .output import Json, Line, emit, facts, say, table

DATABASE = Annotated[
    str,
    typer.Option(metavar="URL", help="sqlite:///FILE, or postgresql://USER@HOST/NAME."),
]
_ACCESS, _MQTT, _WAVES = arguments.ACCESS, "MQTT", "Waves"


def serve(
    database: DATABASE = "sqlite:///fleet.db",
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on. Others than this machine need a token or mTLS.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8470,
    token_file: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ACCESS,
            help="File with the token that opens the dashboard and the API. "
            "Default: SDLORA_EDGE_FLEET_TOKEN.",
        ),
    ] = None,
    tls_cert: arguments.TlsCert = None,
    tls_key: arguments.TlsKey = None,
    client_ca: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            rich_help_panel=_ACCESS,
            help="Authorities whose client certificates open the dashboard and the API (PEM).",
        ),
    ] = None,
    broker: Annotated[
        str,
        typer.Option(
            metavar="URL",
            rich_help_panel=_MQTT,
            help="Broker to take reports from, such as mqtts://USER@HOST. "
            "The password is in SDLORA_EDGE_MQTT_PASSWORD.",
        ),
    ] = "",
    repository: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER", rich_help_panel=_WAVES, help="Fleet repository whose waves to show."
        ),
    ] = None,
    online_keys: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_WAVES,
            help="Online keys, to advance and pause waves. Default: show them only.",
        ),
    ] = None,
    soak: Annotated[
        float,
        typer.Option(
            metavar="HOURS", min=0, rich_help_panel=_WAVES, help="Least time in each wave."
        ),
    ] = 24,
    least_hours: Annotated[
        float,
        typer.Option(
            metavar="HOURS",
            min=0,
            rich_help_panel=_WAVES,
            help="Time after which a wave without any enrolled device ends.",
        ),
    ] = 24,
    unknown_jump: Annotated[
        float,
        typer.Option(
            metavar="POINTS",
            min=0,
            rich_help_panel=_WAVES,
            help="Rise of the unknown rate, in percentage points, that pauses a packet.",
        ),
    ] = 10,
    silent_after: Annotated[
        Optional[float],
        typer.Option(
            metavar="HOURS",
            min=0,
            help="Time without a report after which a device is silent. "
            "Default: 24 hours or three times its usual interval, whichever is longer.",
        ),
    ] = None,
    keep_days: Annotated[
        int, typer.Option(metavar="DAYS", min=1, help="Age at which reports are removed.")
    ] = 90,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Time between two looks at the fleet.")
    ] = 30,
) -> None:
    """Collect reports, show the fleet in a browser, and drive waves, until SIGTERM or Ctrl-C."""
    from ..fleet.collector import running

    choice = running.Choice(
        database=database,
        host=host,
        port=port,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        broker=broker,
        repository=repository,
        online_keys=online_keys,
        soak=soak,
        least_hours=least_hours,
        unknown_jump=unknown_jump,
        silent_after=silent_after,
        keep_days=keep_days,
        every=every,
    )
    running.run(choice, lambda url: say(f"fleet: {url}"))


def enroll(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="What sdlora-edge device identity --json printed on a device."
        ),
    ],
    database: DATABASE = "sqlite:///fleet.db",
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Accept a new key of a device that is enrolled already."),
    ] = False,
    json: Json = False,
) -> None:
    """Accept the reports of devices."""
    from ..fleet.collector import running

    value = running.enroll_files(database, files, replace)
    emit(
        value,
        json,
        lambda: [
            f"enrolled: {len(value.added)} new, {len(value.changed)} with a new key, "
            f"{len(value.known)} known before"
        ],
    )


def devices(
    database: DATABASE = "sqlite:///fleet.db",
    channel: Annotated[
        str, typer.Option(metavar="NAME", help="Only devices of this channel.")
    ] = "",
    group: Annotated[str, typer.Option(metavar="NAME", help="Only devices of this group.")] = "",
    task: Annotated[
        Optional[int], typer.Option(metavar="N", help="Only devices that serve this task.")
    ] = None,
    silent_after: Annotated[
        Optional[float],
        typer.Option(
            metavar="HOURS", min=0, help="Time without a report after which a device is silent."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show which device has which model, and how it is."""
    from ..fleet.collector import running

    value = running.fleet_now(database, (channel, group, task), silent_after)
    emit(value, json, lambda: _shown(value))


def _shown(value: object) -> list[Line]:
    from ..fleet.collector.running import FleetNow

    assert isinstance(value, FleetNow)
    return [*facts(value.conditions, *value.conditions), "", *table(value.head(), value.cells())]

"""`device configure`, `device identity` and `device report`: who a device is in its fleet."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from . import arguments, sync
from .output import Json, Line, emit, facts, fields


def configure(
    store: arguments.Store,
    name: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Name for people. Default: the host's.")
    ] = None,
    channel: Annotated[
        Optional[str], typer.Option(metavar="NAME", help="Roll-outs to follow. Default: default.")
    ] = None,
    group: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="Group of the device; repeat it for several."),
    ] = None,
    url: Annotated[
        Optional[str], typer.Option(metavar="URL", help="URL of the fleet repository.")
    ] = None,
    report_to: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="URL",
            help="Place for reports: mqtt(s)://, http(s)://, or a file; repeat it for several.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Give a device an identity in its fleet, or change it.

    The first call makes an id and a key. An option that is not given leaves its value as it is; an
    empty --group or --report-to removes all.
    """
    from ..fleet.identity import Changes
    from ..fleet.identity import configure as change

    groups, places = _values(group), _values(report_to)
    found = change(store, Changes(name, channel, groups, url, places))
    emit(found, json, lambda: facts(found, *fields(found)))


def identity(store: arguments.Store, json: Json = False) -> None:
    """Show who a device is. `fleet enroll` reads what --json prints."""
    from ..fleet.identity import identity as read

    found = read(store)
    emit(found, json, lambda: facts(found, *fields(found)))


def report(
    store: arguments.Store,
    to: Annotated[
        Optional[str],
        typer.Option(metavar="URL", help="Place to report to, in place of the configured ones."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")
    ] = False,
    ca: sync.Ca = None,
    client_cert: sync.ClientCert = None,
    client_key: sync.ClientKey = None,
    json: Json = False,
) -> None:
    """Report what a device serves, its errors, and counts of its predictions.

    Nothing about an image or a single prediction is sent.
    """
    from ..fleet import one_report
    from ..fleet.mqtt_link import Options

    if dry_run:
        shown = one_report.dry_run(store)
        emit(shown, json, lambda: facts(shown, *fields(shown)))
        return
    sent = one_report.report_once(store, to, Options.given(ca, client_cert, client_key))
    lines: list[Line] = [f"{place}: delivered" for place in sent.delivered]
    emit(sent, json, lambda: [*lines, f"report {sent.report.number}, {sent.size} bytes"])
    if sent.refused:
        raise typer.Exit(max(refusal.exit_code for refusal in sent.refused))


def _values(given: list[str] | None) -> tuple[str, ...] | None:
    """Those that are not empty; None if the option was not given."""
    return None if given is None else tuple(value for value in given if value)

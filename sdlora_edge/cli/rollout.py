"""`sdlora-edge fleet rollout`: which share of a channel's devices may take which packet."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UsageError
from .fleet import KEYS, REPOSITORY, At, Keys, opened
from .fleet_text import steps
from .help import CONTEXT, Command, Group
from .output import Json, emit

if TYPE_CHECKING:
    from ..fleet.rollout import Plan, Step

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Start and steer roll-outs, with the online keys alone.",
)
Packet = Annotated[
    str,
    typer.Argument(
        metavar="PACKET",
        help="Its file, the number of its task, or the first digits of its digest.",
    ),
]
Channel = Annotated[
    str, typer.Option("--channel", metavar="CHANNEL", help="The devices that are configured so.")
]
Why = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Shown to people.")]


@app.command(cls=Command)
def start(
    packet: Packet,
    channel: Channel,
    waves: Annotated[
        str,
        typer.Option(metavar="PERCENT,...", help="Shares of the devices, ascending to 100."),
    ] = "1,10,50,100",
    groups: Annotated[
        Optional[str],
        typer.Option(metavar="GROUP,...", help="Devices in these groups take it at once."),
    ] = None,
    success: Annotated[
        int,
        typer.Option(
            metavar="PERCENT",
            min=0,
            max=100,
            help="Devices of a wave that must report success before the next wave.",
        ),
    ] = 95,
    error: Annotated[
        int,
        typer.Option(
            metavar="PERCENT",
            min=0,
            max=100,
            help="Devices of a wave with errors at which the roll-out pauses.",
        ),
    ] = 2,
    not_before: Annotated[
        Optional[str],
        typer.Option(
            metavar="TIME",
            help="Nobody takes it before, such as 2026-12-01T06:00Z. Local time without an offset.",
        ),
    ] = None,
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """Let the first wave of a channel take a published packet."""
    at, folder = opened(repository, keys)
    from ..fleet import pacing
    from ..fleet.online import OnlineKeys
    from ..fleet.overview import find_update

    pace = pacing.Pace(
        pacing.percentages(waves),
        [group for group in (groups or "").split(",") if group],
        success,
        error,
        pacing.moment(not_before) if not_before else 0,
    )
    target = find_update(at.targets(), packet)
    change = partial(pacing.start, target=target, pace=pace, clock=time.time())
    plan = at.pace(channel, change, OnlineKeys.load(folder.online))
    emit(plan, json, lambda: steps(plan.to_dict()))


@app.command(cls=Command)
def pause(
    packet: Packet,
    channel: Channel,
    reason: Why = "by hand",
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """Let no further device take a packet, nor a later one."""
    from ..fleet import pacing

    _change(
        (repository, keys),
        (packet, channel),
        lambda plan, step: pacing.pause(plan, step.packet, reason, time.time()),
        json,
    )


@app.command(cls=Command)
def resume(
    packet: Packet,
    channel: Channel,
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """Let the devices of the wave take a paused packet."""
    from ..fleet import pacing

    _change(
        (repository, keys),
        (packet, channel),
        lambda plan, step: pacing.resume(plan, step.packet, time.time()),
        json,
    )


@app.command(cls=Command)
def advance(
    packet: Packet,
    channel: Channel,
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """Put the next wave in force."""
    from ..fleet import pacing

    _change(
        (repository, keys),
        (packet, channel),
        lambda plan, step: pacing.advance(plan, step.packet, time.time()),
        json,
    )


@app.command(cls=Command)
def abort(
    packet: Packet,
    channel: Channel,
    reason: Why = "by hand",
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """End a roll-out for good. Only a revocation takes the packet back from devices."""
    from ..fleet import pacing

    _change(
        (repository, keys),
        (packet, channel),
        lambda plan, step: pacing.abort(plan, step.packet, reason, time.time()),
        json,
    )


@app.command(cls=Command)
def status(
    channel: Annotated[
        Optional[str],
        typer.Option("--channel", metavar="CHANNEL", help="Only this channel. Default: all."),
    ] = None,
    repository: At = REPOSITORY,
    keys: Keys = KEYS,
    json: Json = False,
) -> None:
    """Show the steps of each channel. The wave in force is in brackets."""
    at, _ = opened(repository, keys)
    names = at.channels()
    if channel is not None and channel not in names:
        raise UsageError(f"no channel {channel!r}: there are {', '.join(names) or 'none'}")
    plans = [at.plan(name) for name in ([channel] if channel else names)]
    value = {"channels": [plan.to_dict() for plan in plans]}
    none = ["no roll-out has begun: sdlora-edge fleet rollout start begins one"]
    emit(value, json, lambda: [line for p in value["channels"] for line in steps(p)] or none)


def _change(
    places: tuple[Path, Path],
    named: tuple[str, str],
    change: Callable[[Plan, Step], Plan],
    json: bool,
) -> None:
    at, folder = opened(*places)
    from ..fleet.online import OnlineKeys
    from ..fleet.overview import find_step

    packet, channel = named
    online = OnlineKeys.load(folder.online)
    plan = at.pace(channel, lambda plan: change(plan, find_step(plan, packet)), online)
    emit(plan, json, lambda: steps(plan.to_dict()))

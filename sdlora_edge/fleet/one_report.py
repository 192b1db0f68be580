"""`device report`: one report of a device, sent or only shown."""

from __future__ import annotations

from pathlib import Path

from ..device.device import IN_PLACE, Device
from ..errors import SdloraError, UsageError
from ..results import Status
from . import ledger
from .identity import device_signer, identity
from .mqtt_link import Options
from .report import Report, seal, surroundings, unseal
from .reporting import Reporter, Sent, compose


def serving(store: Path) -> Status | SdloraError:
    """The status of a device; or the error because of which it serves nothing."""
    try:
        return Device.open(store, swap=IN_PLACE).status()
    except SdloraError as error:
        return error


def dry_run(store: Path) -> Report:
    """What the next report would say, cut to the bytes that it may have. Nothing is written.

    Raises:
        InputError: The device has no identity, or its key cannot be read.
    """
    who = identity(store)
    counted = ledger.preview(store, surroundings(store).time)
    sealed = seal(compose(store, who, serving(store), counted), device_signer(store))
    return unseal(sealed, {who.id: who.public})


def report_once(store: Path, to: str | None, options: Options) -> Sent:
    """Report to the configured places, or to another one.

    Raises:
        UsageError: No place is configured, and none is given.
    """
    who = identity(store)
    places = who.report_to if to is None else (to,)
    if not places:
        raise UsageError(
            "this device reports nowhere: name a place with --to, or run sdlora-edge device "
            f"configure --store {store} --report-to URL"
        )
    with Reporter(store, who, options, stays=False) as reporter:
        return reporter.report_to(places, serving(store))

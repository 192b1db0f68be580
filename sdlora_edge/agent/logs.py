"""How the agent writes: events and the library's logs, all on stderr and all in one form."""

from __future__ import annotations

import logging

from ..device.watch.events import Emit, JsonLog, text_to_stderr, to_stderr

FORMATS: dict[str, Emit] = {"json": to_stderr, "text": text_to_stderr}


def logging_as(form: str) -> Emit:
    """Write warnings and errors of every library as events in one of FORMATS; what writes one."""
    emit = FORMATS[form]
    logging.basicConfig(handlers=[JsonLog(emit)], level=logging.WARNING, force=True)
    return emit

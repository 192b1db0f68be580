"""Where the agent's updates come from: what the command line says, without what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..fleet.fetching import Link


@dataclass(frozen=True)
class Source:
    """Where updates come from, and how often the device looks and reports.

    Attributes:
        url: Of a fleet repository. None takes the one of the device's identity, if it has one.
        folder: That packets appear in, instead of a repository.
        link: How to reach the repository, and where reports go.
        every: Seconds between two looks; None takes what is usual.
        report_every: Seconds between two reports if nothing changes.
        status: The JSON file to keep for monitoring.
    """

    url: str | None = None
    folder: Path | None = None
    link: Link | None = None
    every: float | None = None
    report_every: float = 3600.0
    status: Path | None = None

    def __post_init__(self) -> None:
        if self.url is not None and self.folder is not None:
            raise UsageError("--from and --watch are two places to look at: give one of them")
        if self.url is not None and self.every is not None and self.every < 1:
            raise UsageError(
                f"--every {self.every:g} is too often for a repository: give 1 or more"
            )

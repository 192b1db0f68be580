"""The report of a run: one self-contained HTML page. Only its thumbnails need torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...results import Result
from ...storage import atomic
from .summary import Summary

__all__ = ["ReportResult", "write"]


@dataclass(frozen=True)
class ReportResult(Result):
    """A report that was written.

    Attributes:
        report: The page.
        bytes: Its size.
        summary: What it shows, except for the thumbnails.
    """

    report: Path
    bytes: int
    summary: Summary


def write(run: Path, out: Path, thumbnails: bool = False) -> ReportResult:
    """Write the report of a run.

    Args:
        run: The run's folder.
        out: The page to write.
        thumbnails: Whether to embed some confused test images. This loads and runs the model.

    Raises:
        InputError: The run has no scored task yet, or is damaged.
        StorageError: The page cannot be written.
    """
    from . import page, summary  # jinja2
    from .thumbnails import confused

    found = summary.read(run)
    shown = confused(run, found.confusions or ()) if thumbnails else None
    html = page.render(found, shown).encode()
    atomic.write(out, html)
    return ReportResult(out, len(html), found)

"""The page on a real web server."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import debian

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The URL of a folder, served by python -m http.server."""
    port = debian.free_port()
    words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    command = [*words, "--directory", str(site)]
    with debian.running(command, port, site.with_suffix(".log"), signal.SIGKILL):
        yield f"http://127.0.0.1:{port}"

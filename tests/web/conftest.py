"""A real web server with the page, and a real browser."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
from selenium import webdriver

WEB = Path(__file__).resolve().parents[2] / "web"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `web` in it; tests put their files beside."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "web").symlink_to(WEB)
    return folder


@pytest.fixture(scope="session")
def url(site: Path) -> Iterator[str]:
    """Of `site`, served by python -m http.server."""
    port = debian.free_port()
    words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    command = [*words, "--directory", str(site)]
    with debian.running(command, port, site.with_suffix(".log"), signal.SIGKILL):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = debian.program("chromium")
    words = ["--headless=new", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"]
    for word in [*words, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(debian.program("chromedriver"))
    found = webdriver.Chrome(options=options, service=service)
    found.set_script_timeout(60)
    yield found
    found.quit()

"""A real web server with the page, a real browser, and a real bundle for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import debian
import pytest
from conftest import Fleet
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions
from selenium import webdriver
from site_kit import ROOT, WEB, served

from sdlora_edge.train.run import Run

ORT = WEB / "node_modules" / "onnxruntime-web" / "dist" / "ort-wasm-simd-threaded.wasm"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `web` and the test vectors in it; tests put their files beside."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "web").symlink_to(WEB)
    (folder / "vectors").symlink_to(ROOT / "tests" / "vectors")
    return folder


@pytest.fixture(scope="session")
def url(site: Path) -> Iterator[str]:
    with served(site) as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """With a camera that shows a moving shape."""
    camera = ("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream")
    with debian.chromium("enable-unsafe-swiftshader", *camera) as found:
        found.set_script_timeout(300)
        yield found


@pytest.fixture(scope="session")
def web_bundle(fleet: Fleet, site: Path) -> Path:
    """The fleet's bundle for JavaScript, where the server serves it."""
    if not ORT.is_file():
        pytest.skip("onnxruntime-web is not here: run npm ci in web/, or make test-web")
    public = next(fleet.key.parent.glob("*.pub"))
    options = ExportOptions(runs_in="web")
    export_bundle(Run.open(fleet.run), site / "bundle", 0, [str(public)], options)
    return site / "bundle"

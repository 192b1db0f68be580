"""Tests to carry to a device.

    pytest device_tests --bundle B --packets DIR [--expected DIR] [--store DIR] [--report FILE]

Needs the core install and pytest. The checks are in `sdlora_edge.selftest`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlora_edge.selftest.checks import Report
from sdlora_edge.selftest.kit import Kit, open_kit


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("device")
    group.addoption("--bundle", type=Path, help="the bundle that devices are flashed with")
    group.addoption("--packets", type=Path, help="a folder with packets that follow from it")
    group.addoption("--expected", type=Path, help="what `sdlora-edge expect` recorded on the host")
    group.addoption(
        "--store", type=Path, help="a folder on the disk to test; default: where temporary files go"
    )
    group.addoption("--report", type=Path, help="the JSON file to send back")


@pytest.fixture(scope="session")
def kit(pytestconfig: pytest.Config) -> Iterator[Kit]:
    bundle, packets, expected, store = (
        pytestconfig.getoption(name) for name in ("bundle", "packets", "expected", "store")
    )
    if not (bundle and packets):
        pytest.exit("name what to test: --bundle B --packets DIR", returncode=2)
    with open_kit(bundle, packets, expected, store) as opened:
        yield opened


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Iterator[Report]:
    found = Report()
    yield found
    if path := pytestconfig.getoption("report"):
        found.value().write(path)

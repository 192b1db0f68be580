"""Real servers for the tests of the fleet. A test that uses one is marked `debian`."""

from __future__ import annotations

from collections.abc import Iterator

import debian
import pytest


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[debian.Database]:
    with debian.postgresql() as server:
        yield server


@pytest.fixture
def postgresql(postgresql_server: debian.Database) -> str:
    """The SQLAlchemy URL of a new, empty database on a real PostgreSQL."""
    return postgresql_server.new()


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real mosquitto on 127.0.0.1, without TLS."""
    with debian.mosquitto(tmp_path_factory.mktemp("mosquitto")) as port:
        yield port


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> debian.Certificates:
    return debian.certificates(tmp_path_factory.mktemp("certificates"))

"""One fixture for all scenarios: restarts that came out once are remembered."""

from __future__ import annotations

import pytest
from conftest import Fleet
from faults.scenarios import Fixture


@pytest.fixture(scope="session")
def device_life(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(fleet, tmp_path_factory.mktemp("faults"))

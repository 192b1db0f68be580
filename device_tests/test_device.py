"""Every promise, on this very device."""

from __future__ import annotations

import pytest

from sdlora_edge.selftest.checks import CHECKS, Report
from sdlora_edge.selftest.kit import Kit


@pytest.mark.parametrize("name", CHECKS)
def test_device(name: str, kit: Kit, report: Report) -> None:
    report.check(name, kit)

"""A model that crashes its runtime ends a child process, never the program that asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Fleet, Result, retargeted

from sdlora_edge.device import Device, trial
from sdlora_edge.device.device import open_store
from sdlora_edge.errors import HealthError, ResourceError

ENGINE = """
import os, signal
from sdlora_edge.device.engines.onnx_runtime import OnnxEngine

class FatalEngine(OnnxEngine):
    def load(self, weights):
        {what}
        return super().load(weights)
"""
SEGFAULT = "os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.fixture
def fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package whose engine for the target `fatal` does something, when it loads weights."""
    site = tmp_path / "site"
    (site / "fatal-1.dist-info").mkdir(parents=True)
    (site / "fatal-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fatal\nVersion: 1\n"
    )
    (site / "fatal-1.dist-info" / "entry_points.txt").write_text(
        "[sdlora_edge.engines]\nfatal = fatal:FatalEngine\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield lambda what: (site / "fatal.py").write_text(ENGINE.format(what=what))
    sys.modules.pop("fatal", None)


def test_a_crash_is_an_error_with_advice_and_leaves_nothing(
    fleet: Fleet, fatal, tmp_path: Path
) -> None:
    fatal(SEGFAULT)
    bundle = retargeted(fleet, tmp_path / "bundle", "fatal")
    with pytest.raises(HealthError) as caught:
        Device.init(bundle, tmp_path / "store")
    for words in (
        "SIGSEGV",
        "target fatal, precision fp32, weights as inputs",
        "another version",
        "--weights-as constants",
    ):
        assert words in str(caught.value)
    assert not (tmp_path / "store").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "site"}


def test_the_runtimes_version_is_named(fleet: Fleet) -> None:
    import onnxruntime

    from sdlora_edge.formats.bundle import open_bundle

    message = str(trial._error(signal.SIGSEGV, "", open_bundle(fleet.bundle).manifest))
    assert f"onnxruntime {onnxruntime.__version__}" in message
    assert "install another version of onnxruntime" in message


@pytest.mark.parametrize(
    "what",
    [
        *(f"os.kill(os.getpid(), {n})" for n in ("signal.SIGKILL", "signal.SIGTERM", "35")),
        "os.write(2, b'std::bad_alloc'); os.abort()",
    ],
)
def test_memory_that_runs_out_is_no_verdict(fleet: Fleet, fatal, tmp_path: Path, what: str) -> None:
    fatal(what)
    with pytest.raises(ResourceError, match=r"could not be tried .* free memory, then try again"):
        Device.init(retargeted(fleet, tmp_path / "bundle", "fatal"), tmp_path / "store")


def test_a_child_that_raises_is_no_verdict(fleet: Fleet, fatal, tmp_path: Path) -> None:
    fatal(f"if os.getpid() != {os.getpid()}: raise ValueError")
    assert (
        Device.init(retargeted(fleet, tmp_path / "bundle", "fatal"), tmp_path / "store")
        .status()
        .task
        == 0
    )


def test_the_command_and_selftest_report_it(fleet: Fleet, fatal, cli, tmp_path: Path) -> None:
    fatal(SEGFAULT)
    bundle, report = retargeted(fleet, tmp_path / "bundle", "fatal"), tmp_path / "report.json"
    found: Result = cli("device", "init", "--bundle", bundle, "--store", tmp_path / "store")
    errors = [line for line in found.err.splitlines() if not line.endswith(" ...")]
    assert (found.code, len(errors)) == (6, 1)
    assert "SIGSEGV" in errors[0]
    found = cli(
        "device",
        "selftest",
        "--bundle",
        bundle,
        "--packets",
        fleet.packets[0].parent,
        "--report",
        report,
    )
    assert found.code == 6
    checks = json.loads(report.read_text())["checks"]
    assert checks["environment"]["passed"]
    assert "SIGSEGV" in checks["parity"]["error"]


def test_a_bundle_is_tried_once_and_not_where_nothing_runs(
    fleet: Fleet, fatal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: tried.append(a) or real(*a, **k))
    monkeypatch.setattr(trial, "_survived", set())
    Device.init(fleet.bundle, tmp_path / "1")
    Device.init(fleet.bundle, tmp_path / "2")
    assert len(tried) == 1
    fatal(SEGFAULT)
    store = tmp_path / "2"
    assert trial.tried(store, True, open_store) == store
    assert len(tried) == 1


def test_a_program_that_cannot_be_imported_can_make_a_store(fleet: Fleet, tmp_path: Path) -> None:
    """From stdin there is no file to import again, and what lies in the current folder is not taken for a module."""
    program = f"from sdlora_edge.device import Device, trial\nDevice.init({str(fleet.bundle)!r}, 'store')\nassert trial._survived"
    for name in ("json", "numpy", "subprocess"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
        )
    done = subprocess.run(
        [sys.executable, "-I", "-"],
        input=program,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr

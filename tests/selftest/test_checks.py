"""The suite for devices runs with nothing installed but what the core install declares."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import Fleet, Result, make_images, snapshot

from sdlora_edge.errors import ResourceError
from sdlora_edge.selftest import checks
from sdlora_edge.selftest.kit import EXPECTED, Kit

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


def required(names: list[str]) -> set[str]:
    """These distributions and all they require on this machine, without extras."""
    found: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for requirement in metadata.requires(name) or []:
            text, _, marker = requirement.partition(";")
            if "extra" not in marker and not re.search(
                r"python_version\s*<|win32|Windows|tomllib", marker
            ):
                names.append(re.split(r"[\s<>=!~\[(]", text.strip())[0])
    return found


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, links to its declared dependencies, and pytest."""
    folder = tmp_path_factory.mktemp("device")
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(wheel, check=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (built,) = folder.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(built),
    ]
    subprocess.run(install, check=True)
    for name in required(["sdlora-edge", "pytest"]) - {"sdlora-edge"}:
        for file in metadata.distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(
                    Path(str(metadata.distribution(name).locate_file(top))).resolve()
                )
    return folder / "venv" / "bin" / "python"


@pytest.fixture
def expected(fleet: Fleet, tmp_path: Path, cli: Cli) -> Path:
    """What the host answers for images of two sizes and kinds."""
    images = make_images(tmp_path / "made", ["a", "b"], 3, size=23)
    flat = tmp_path / "images"
    flat.mkdir()
    for path in images.rglob("*.png"):
        path.rename(flat / f"{path.parent.name}{path.name}")
    result = cli("expect", flat, "--run", fleet.run, "--out", tmp_path / "expected", "--json")
    assert json.loads(result.out) == {
        "expected": str(tmp_path / "expected"),
        "images": 6,
        "states": 4,
    }
    return tmp_path / "expected"


def test_a_device_without_torch_passes_every_check(
    fleet: Fleet, device_python: Path, expected: Path, tmp_path: Path
) -> None:
    without = [str(device_python), "-c", "import onnxruntime, sdlora_edge.device, torch"]
    assert (
        "No module named 'torch'"
        in subprocess.run(without, capture_output=True, text=True, check=False, cwd=tmp_path).stderr
    )
    packets, report = fleet.packets[0].parent, tmp_path / "report.json"
    shutil.copytree(ROOT / "device_tests", tmp_path / "carried")
    command = [
        device_python,
        "-m",
        "pytest",
        tmp_path / "carried",
        "--bundle",
        fleet.bundle,
        "--packets",
        packets,
    ]
    command += [
        "--expected",
        expected,
        "--store",
        tmp_path / "disk",
        "--report",
        report,
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    found = json.loads(report.read_text())
    assert found["passed"]
    checks = found["checks"]
    assert "torch" not in checks["environment"]["versions"]
    assert checks["signatures"]["packets"] == 3
    assert (
        checks["parity"]["images"],
        checks["parity"]["states"],
        checks["parity"]["same_answers"],
    ) == (6, 4, 24)
    assert 0 < checks["parity"]["largest_difference"] <= 1e-4
    assert checks["hot_swap"]["predictions"] > 20
    assert checks["kill_and_reopen"]["kills"] == 5
    assert checks["cost"]["apply_ms"] > 0
    assert not list((tmp_path / "disk").iterdir()), "the scratch store is gone"


def test_the_selftest_command_reports_what_failed(
    fleet: Fleet, device_python: Path, expected: Path, tmp_path: Path
) -> None:
    known = json.loads((expected / EXPECTED).read_text())
    for state in known["states"].values():
        state["logits"][2][0] += 0.5
    (expected / EXPECTED).write_text(json.dumps(known))
    before = snapshot(fleet.bundle)
    command = [
        device_python,
        "-m",
        "sdlora_edge",
        "device",
        "selftest",
        "--bundle",
        fleet.bundle,
        "--expected",
        expected,
    ]
    command += [
        "--packets",
        fleet.packets[0].parent,
        "--report",
        tmp_path / "report.json",
        "--json",
    ]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 6, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "report.json").read_text())
    assert {name for name, check in found["checks"].items() if not check["passed"]} == {"parity"}
    assert "logits differ from the host's by" in found["checks"]["parity"]["error"]
    assert snapshot(fleet.bundle) == before


def test_bad_kits_are_one_clear_line(
    fleet: Fleet, cli: Cli, expected: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = cli("device", "selftest", "--bundle", fleet.bundle, "--packets", tmp_path / "empty")
    assert (result.code, len(result.err.splitlines())) == (3, 1)
    assert "no packet that this bundle trusts" in result.err
    assert cli("expect", tmp_path / "empty", "--run", fleet.run, "--out", tmp_path / "e").code == 3
    assert not (tmp_path / "e").exists()


def test_a_scratch_folder_that_cannot_be_made_is_named(
    fleet: Fleet, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for scratch in (tmp_path / "file", tmp_path / "file" / "below"):
        found = cli(
            "device",
            "selftest",
            "--bundle",
            fleet.bundle,
            "--packets",
            fleet.packets[0].parent,
            "--scratch",
            scratch,
        )
        assert found.code == 3
        assert str(scratch) in found.err


def test_a_slow_board_gets_its_report(
    fleet: Fleet, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, slow = subprocess.Popen.communicate, []

    def communicate(
        self: subprocess.Popen[str], input: None = None, timeout: float | None = None
    ) -> tuple[str, str]:
        if timeout is None:
            return real(self, input)
        slow.append(self)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    few = {name: checks.CHECKS[name] for name in ("environment", "hot_swap", "cost")}
    monkeypatch.setattr(checks, "CHECKS", few)
    kit = [
        "--bundle",
        fleet.bundle,
        "--packets",
        fleet.packets[0].parent,
        "--report",
        tmp_path / "report.json",
        "--json",
    ]
    found = cli("device", "selftest", *kit)
    assert found.code == 6
    assert "internal error" not in found.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(found.out)
    assert {name: check["passed"] for name, check in report["checks"].items()} == {
        "environment": True,
        "hot_swap": False,
        "cost": False,
    }
    assert "did not end within 600 s" in report["checks"]["cost"]["error"]
    assert len(slow) == 2
    assert all(process.returncode is not None for process in slow), "they are killed"


@pytest.mark.parametrize(
    "error", [ValueError("no such thing"), AssertionError(), KeyboardInterrupt()]
)
def test_whatever_a_check_meets_the_report_is_written(
    fleet: Fleet, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def signatures(kit: Kit) -> checks.Signatures:
        raise error

    few = {"environment": checks.environment, "signatures": signatures, "parity": checks.parity}
    monkeypatch.setattr(checks, "CHECKS", few)
    kit = [
        "--bundle",
        fleet.bundle,
        "--packets",
        fleet.packets[0].parent,
        "--report",
        tmp_path / "report.json",
    ]
    stopped = isinstance(error, KeyboardInterrupt)
    assert cli("device", "selftest", *kit).code == (130 if stopped else 6)
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert not report["checks"]["signatures"]["passed"]
    assert ("parity" in report["checks"]) is not stopped


def test_a_report_that_cannot_be_written_ends_the_command_at_once_and_loses_no_check(
    fleet: Fleet, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, written = tmp_path / "report.json", list[dict[str, Any]]()
    kit = [
        "--bundle",
        fleet.bundle,
        "--packets",
        fleet.packets[0].parent,
        "--report",
        report,
        "--json",
    ]
    monkeypatch.setattr(
        checks, "CHECKS", {name: checks.CHECKS[name] for name in ("environment", "signatures")}
    )
    write = checks.SelftestReport.write

    def until_full(self: checks.SelftestReport, path: Path) -> None:
        if len(written) == room:
            raise ResourceError("disk space ran out")
        write(self, path)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(checks.SelftestReport, "write", until_full)
    for room in range(3):
        written.clear()
        found = cli("device", "selftest", *kit)
        shown = json.loads(found.out)
        assert (found.code, shown["error"]["exit_code"], shown["passed"]) == (8, 8, False)
        assert list(shown["checks"]) == ["environment", "signatures"][:room]
        assert report.exists() == (room > 0)
    room = 3
    written.clear()
    assert cli("device", "selftest", *kit).code == 0
    assert [(one["passed"], len(one["checks"])) for one in written] == [
        (False, 0),
        (False, 1),
        (True, 2),
    ]

"""On an emulated ARM64 machine: the device suite in all precisions, and the C++ programs, cross-compiled.

`make test-arm` runs these tests: docs/platforms.md says what they need and how long they take.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from arm_machine import ROOT, Machine, machine
from conftest import Fleet, images
from cpp_kit import Toolchain, equal, raw, running
from PIL import Image
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.expected import record
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.device import Device
from sdlora_edge.device.export_weights import export_weights
from sdlora_edge.train.run import Run

pytestmark = pytest.mark.arm
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic")
LIMIT = 1200
"""seconds"""


@pytest.fixture(scope="module")
def arm() -> Machine:
    return machine()


@pytest.fixture(scope="module")
def toolchain(arm: Machine) -> Toolchain:
    headers = [arm.root / "usr" / "include", arm.root / "usr" / "include" / "aarch64-linux-gnu"]
    options = [
        *(f"-isystem{path}" for path in headers),
        f"-L{arm.root / 'usr/lib/aarch64-linux-gnu'}",
    ]
    return Toolchain("aarch64-linux-gnu-g++", arm.wheels, tuple(options))


def bundle(fleet: Fleet, out: Path, options: ExportOptions) -> Path:
    export_bundle(Run.open(fleet.run), out, 0, [str(fleet.key.with_suffix(".pub"))], options)
    return out


@pytest.fixture(scope="module")
def expected(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "images").mkdir()
    for i, image in enumerate(images()):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    record(Run.open(fleet.run), folder / "images", folder / "made")
    return folder / "made"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_device_suite_passes(
    fleet: Fleet, expected: Path, arm: Machine, tmp_path: Path, precision: str
) -> None:
    made = bundle(fleet, tmp_path / "bundle", ExportOptions(precision=precision))
    report = tmp_path / "report.json"
    command = [arm.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "device_tests"]
    command += ["--bundle", made, "--packets", fleet.packets[0].parent, "--expected", expected]
    command += ["--report", report, "-k", "not cost"]  # an emulator's times say nothing
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=LIMIT,
        cwd=tmp_path, env=arm.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads(report.read_text())
    assert "aarch64" in report.read_text()
    assert {check["passed"] for check in found["checks"].values()} == {True}


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_cpp_programs_give_the_devices_answers(
    fleet: Fleet, arm: Machine, toolchain: Toolchain, tmp_path: Path, runtime: str
) -> None:
    """Compiled here for that machine. The device that they are compared with is this one."""
    kind = {"onnx": "adapter", "executorch": "ptd"}[runtime]
    program = getattr(toolchain, runtime)(tmp_path)
    made = bundle(fleet, tmp_path / "bundle", ExportOptions(target=runtime, max_classes=20))
    device, served = Device.init(made, tmp_path / "store"), tmp_path / "served"
    seen = [*images(2), np.zeros((16, 16, 3), np.uint8)]
    files = [raw(device, image, tmp_path / f"{i}.rgb") for i, image in enumerate(seen)]
    export_weights(device, kind, served / f"now.{kind}")
    command = [*arm.command(program), str(made), str(served)]
    with running(command, tmp_path / "log") as there:
        for packet in fleet.packets:
            device.apply(packet)
            export_weights(device, kind, served / f"now.{kind}")
            for image, file in zip(seen, files, strict=True):
                equal(there.answer(file), device, image, 1e-3)

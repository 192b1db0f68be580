"""The C++ programs of examples/cpp: the device's own answers, after each update, and of no other run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, images
from cpp_kit import Toolchain, equal, raw, running, wheels
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions
from telling import packets

from sdlora_edge.device import Device
from sdlora_edge.device.export_weights import export_weights
from sdlora_edge.formats.current import CURRENT, Current
from sdlora_edge.train.run import Run

pytestmark = pytest.mark.debian
TOLD = [(-3.0, 2.0), (None, 3.0), (1.0, 0.5)]
SEEN = [*images(3), np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)]


@pytest.fixture(scope="module")
def told(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Packets whose unknown score needs the features."""
    out = tmp_path_factory.mktemp("told") / "packets"
    return packets(Run.open(fleet.run), fleet, out, TOLD, away=True)


@pytest.fixture(scope="module")
def onnx_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Toolchain("g++", wheels("onnxruntime")).onnx(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def executorch_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch", reason="ExecuTorch is not installed")
    return Toolchain("g++", wheels("executorch")).executorch(tmp_path_factory.mktemp("et"))


def test_with_onnx_runtime_each_update_is_taken_over_while_it_runs(
    fleet: Fleet, store: Path, told: list[Path], onnx_program: Path, tmp_path: Path
) -> None:
    device, served = Device.open(store), tmp_path / "served"
    export_weights(device, "adapter", served / "a.onnx_adapter")
    files = [raw(device, image, tmp_path / f"{i}.rgb") for i, image in enumerate(SEEN)]
    seen = set()
    command = [str(onnx_program), str(store / "bundle"), str(served)]
    with running(command, tmp_path / "log") as program:
        for packet in [None, *told]:
            if packet:
                device.apply(packet)
                export_weights(device, "adapter", served / "a.onnx_adapter")
            for image, file in zip(SEEN, files, strict=True):
                seen.add(equal(program.answer(file), device, image, 1e-4))
        (tmp_path / "small.rgb").write_bytes(b"small")
        assert "768 are needed" in program.answer(tmp_path / "small.rgb")["error"]
    assert seen == {True, False}
    assert (tmp_path / "log").read_text() == ""


def test_weights_of_another_run_or_a_changed_file_are_refused(
    store: Path, onnx_program: Path, tmp_path: Path
) -> None:
    device, served = Device.open(store), tmp_path / "served"
    adapter = served / "a.onnx_adapter"
    export_weights(device, "adapter", adapter)
    whole, current = adapter.read_bytes(), json.loads((served / CURRENT).read_text())
    file = raw(device, SEEN[0], tmp_path / "0.rgb")
    command = [str(onnx_program), str(store / "bundle"), str(served)]

    def replaced(path: Path, data: bytes) -> None:
        (served / "new").write_bytes(data)
        os.replace(served / "new", path)

    def refusal() -> str:
        done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    with running(command, tmp_path / "log") as program:
        equal(program.answer(file), device, SEEN[0], 1e-4)
        replaced(served / CURRENT, json.dumps({**current, "lineage": "0" * 64}).encode())
        assert "holds weights of another run" in refusal()
        equal(program.answer(file), device, SEEN[0], 1e-4)
        replaced(served / CURRENT, json.dumps(current).encode())
        replaced(adapter, whole[:-1] + bytes([whole[-1] ^ 1]))
        assert "is not the file that current.json describes" in refusal()
        equal(program.answer(file), device, SEEN[0], 1e-4)
    assert (tmp_path / "log").read_text().count("not updated: ") == 2


def test_with_executorch_it_follows_the_devices_own_folder_and_an_exported_one(
    fleet: Fleet, told: list[Path], executorch_program: Path, tmp_path: Path
) -> None:
    out, trust = tmp_path / "bundle", [str(fleet.key.with_suffix(".pub"))]
    options = ExportOptions(target="executorch", max_classes=20)
    export_bundle(Run.open(fleet.run), out, 0, trust, options)
    device, served = Device.init(out, tmp_path / "store"), tmp_path / "served"
    files = [raw(device, image, tmp_path / f"{i}.rgb") for i, image in enumerate(SEEN)]
    export_weights(device, "ptd", served / "now.ptd")
    seen = set()
    own = [str(executorch_program), str(out), str(tmp_path / "store" / "engine")]
    other = [str(executorch_program), str(out), str(served)]
    with running(own, tmp_path / "log") as first, running(other, tmp_path / "log2") as second:
        for packet in [None, *told]:
            if packet:
                device.apply(packet)
                export_weights(device, "ptd", served / "now.ptd")
            for image, file in zip(SEEN, files, strict=True):
                seen.add(equal(first.answer(file), device, image, 1e-4))
                assert first.answer(file) == second.answer(file)
    assert seen == {True, False}
    assert Current.read(served).state == device.status().state
    assert "not updated" not in (tmp_path / "log").read_text() + (tmp_path / "log2").read_text()

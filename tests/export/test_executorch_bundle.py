"""The ExecuTorch target from the command line: the same packets, with its Python runtime and without."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, images, snapshot
from faults.scenarios import wrong_canary
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.parity import host_logits
from sdlora_edge.export.requests import ExportOptions
from telling import between, packets

from sdlora_edge.device import Device
from sdlora_edge.device.device import IN_PLACE
from sdlora_edge.errors import HealthError, InputError, NotForThisDevice, UsageError
from sdlora_edge.formats.canonical import sha256
from sdlora_edge.formats.current import Current
from sdlora_edge.inputs import canary
from sdlora_edge.train.run import Run

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install executorch")


@pytest.fixture(scope="module")
def bundle(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("executorch") / "bundle"
    trust = [str(fleet.key.with_suffix(".pub"))]
    export_bundle(
        Run.open(fleet.run), out, 0, trust, ExportOptions(target="executorch", max_classes=9)
    )
    return out


def test_the_same_packets_up_to_the_capacity(fleet: Fleet, bundle: Path, tmp_path: Path) -> None:
    run, device = Run.open(fleet.run), Device.init(bundle, tmp_path / "store")
    inputs = canary.inputs(3, run.preprocessing, 4)
    for task in (1, 2):
        device.apply(fleet.packets[task - 1])
        np.testing.assert_allclose(device.logits(inputs), host_logits(run, task, inputs), atol=1e-4)
    with pytest.raises(
        NotForThisDevice, match=r"10 classes .* are beyond this bundle's capacity of 9"
    ):
        device.apply(fleet.packets[2])
    device.rollback()
    np.testing.assert_allclose(device.logits(inputs), host_logits(run, 1, inputs), atol=1e-4)
    np.testing.assert_array_equal(
        Device.open(tmp_path / "store").logits(inputs), device.logits(inputs)
    )
    current = Current.read(tmp_path / "store" / "engine")
    assert current is not None
    assert (current.task, current.state) == (1, device.status().state)
    assert current.classes == device.status().classes
    for name, digest in current.files.items():
        assert sha256((tmp_path / "store" / "engine" / name).read_bytes()) == digest
    assert sorted(name[-4:] for name in current.files) == [".ptd", ".pte"]
    del device
    gc.collect()
    before = {path: path.stat().st_ctime_ns for path in (tmp_path / "store").rglob("*")}
    found = Device.verify(tmp_path / "store")
    assert (found.intact, found.serves.task) == (True, 1)
    assert {path: path.stat().st_ctime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_in_place_the_pair_before_comes_back_where_an_update_is_not_served(
    fleet: Fleet, bundle: Path, tmp_path: Path
) -> None:
    Device.init(bundle, tmp_path / "store")
    device, inputs = (
        Device.open(tmp_path / "store", swap=IN_PLACE),
        canary.inputs(3, Run.open(fleet.run).preprocessing, 4),
    )
    before = device.logits(inputs)
    with pytest.raises(HealthError):
        device.apply(wrong_canary(fleet, tmp_path))
    np.testing.assert_array_equal(device.logits(inputs), before)
    device.apply(fleet.packets[0])
    np.testing.assert_allclose(
        device.logits(inputs), host_logits(Run.open(fleet.run), 1, inputs), atol=1e-4
    )
    assert not list((tmp_path / "store" / "engine").glob("new-*"))  # of the pair that was given up


def test_both_engines_give_the_same_answers(
    fleet: Fleet, bundle: Path, store: Path, tmp_path: Path
) -> None:
    """Class, probability, score and whether it is known come from the logits alone."""
    run, devices = Run.open(fleet.run), (Device.init(bundle, tmp_path / "pte"), Device.open(store))
    (file,) = packets(run, fleet, tmp_path / "telling", [(between(run, devices[1], 1), 2.0)])
    for device in devices:
        device.apply(file)
    pte, onnx = (device.predict(images(), top=3) for device in devices)
    assert sorted(answer.known for answer in onnx) == [False] * 3 + [True] * 3
    for one, two in zip(pte, onnx, strict=True):
        assert (one.answer, one.label, one.threshold) == (two.answer, two.label, two.threshold)
        assert (one.score, one.confidence) == pytest.approx((two.score, two.confidence), abs=1e-3)
    current = Current.read(tmp_path / "pte" / "engine")
    assert current is not None
    assert current.confidence["threshold"] == devices[1].status().threshold


def test_weights_that_do_not_fit_leave_no_file(bundle: Path, tmp_path: Path) -> None:
    device = Device.init(bundle, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    weights = device.current()[1]
    for wrong in (
        weights | {"unknown": np.zeros(1, np.float32)},
        weights | {"head.weight": np.zeros((3, 1), np.float32)},
    ):
        with pytest.raises(InputError, match=r"model\.ptd"):
            device._engine.load(wrong)
    assert snapshot(tmp_path / "store") == before


def test_without_the_runtime_an_update_is_published_all_the_same(
    fleet: Fleet, bundle: Path, tmp_path: Path
) -> None:
    """As on a device whose C++ program loads the pair: neither torch nor executorch is there."""
    proved = Device.init(bundle, tmp_path / "proved")
    proved.apply(fleet.packets[0])
    program = """
import sys
for name in ("torch", "executorch", "timm", "onnx"):
    sys.modules[name] = None
from sdlora_edge.cli import main
for arguments in (
    ["device", "init", "--bundle", sys.argv[1], "--store", sys.argv[2]],
    ["device", "init", "--bundle", sys.argv[1], "--store", sys.argv[2], "--unproved"],
    ["device", "apply", sys.argv[3], "--store", sys.argv[2], "--unproved", "--json"],
    ["device", "status", "--store", sys.argv[2]],
):
    print(main(arguments))
"""
    arguments = [str(bundle), str(tmp_path / "store"), str(fleet.packets[0])]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["3", "0", "0", "3"]
    assert done.stderr.count("run pip install 'sdlora-edge[executorch]'") == 2
    assert "Traceback" not in done.stderr
    assert '"canary_difference": null' in done.stdout
    pairs = [Current.read(tmp_path / name / "engine") for name in ("proved", "store")]
    assert pairs[0] == pairs[1] != None  # noqa: E711


def test_what_makes_no_sense_is_said_in_one_line(
    fleet: Fleet, store: Path, tmp_path: Path, cli
) -> None:  # type: ignore[no-untyped-def]
    run = (
        "--run",
        fleet.run,
        "--trust",
        fleet.key.with_suffix(".pub"),
        "--target",
        "executorch",
        "--out",
        tmp_path / "b",
    )
    for options, message in {
        ("--weights-as", "inputs"): "constants only",
        ("--precision", "fp16"): "no precision 'fp16': choose fp32",
        ("--max-classes", "2"): "knows 10 classes already",
        ("--also", "onnx-adapter"): "goes with --target onnx",
    }.items():
        result = cli("export", *run, *options)
        assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
        assert message in result.err
    assert not (tmp_path / "b").exists()
    result = cli("device", "status", "--store", store, "--unproved")
    assert (result.code, "has no use for --unproved" in result.err) == (2, True)


def test_export_without_the_package(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdlora_edge.export.requests.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs the package: pip install 'sdlora-edge\[executorch\]'"
    ):
        export_bundle(
            Run.open(fleet.run),
            tmp_path / "b",
            0,
            [str(fleet.key.with_suffix(".pub"))],
            ExportOptions(target="executorch"),
        )

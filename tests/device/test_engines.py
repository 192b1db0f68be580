"""A third engine is one file and an entry point."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Fleet, pictures, retargeted

from sdlora_edge.device import Device
from sdlora_edge.errors import InputError, UsageError

ENGINE = '''
import numpy as np
from sdlora_edge.device.engines import Engine, Outputs
from sdlora_edge.device.engines.onnx_runtime import OnnxEngine

class CountingEngine(Engine):
    """Runs the model one image at a time, and keeps in its workspace how often an update was published."""

    def __init__(self, bundle, threads, workspace):
        self.inner, self.workspace = OnnxEngine(bundle, threads, workspace), workspace

    def load(self, weights):
        return self.inner.load(weights)

    def outputs(self, loaded, inputs):
        return Outputs(np.concatenate([self.inner.run(loaded, {"pictures": one[None]}) for one in inputs["pictures"]]))

    def publish(self, loaded, state):
        self.workspace.mkdir(exist_ok=True)
        with open(self.workspace / "published", "a") as file:
            file.write(f"{loaded.classes}\\n")
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with an engine for the target `counting`."""
    site = tmp_path / "site"
    (site / "counting-1.dist-info").mkdir(parents=True)
    (site / "counting.py").write_text(ENGINE)
    (site / "counting-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: counting\nVersion: 1\n"
    )
    (site / "counting-1.dist-info" / "entry_points.txt").write_text(
        "[sdlora_edge.engines]\ncounting = counting:CountingEngine\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("counting", None)


@pytest.mark.usefixtures("counting")
def test_an_engine_of_another_package_serves_and_hears_of_every_generation(
    fleet: Fleet, store: Path, tmp_path: Path
) -> None:
    device = Device.init(retargeted(fleet, tmp_path / "bundle", "counting"), tmp_path / "mine")
    for packet in fleet.packets:
        device.apply(packet)
    device.rollback()
    device.apply(fleet.packets[-1], allow_older=True)
    published = (tmp_path / "mine" / "engine" / "published").read_text().split()
    assert published[-5:] == ["6", "8", "10", "8", "10"]
    ours = Device.open(store)
    for packet in fleet.packets:
        ours.apply(packet)
    inputs = pictures(np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32))
    np.testing.assert_allclose(device.logits(inputs), ours.logits(inputs), atol=1e-5)
    assert device.status().target == "counting"
    with pytest.raises(UsageError, match="target counting has no provider openvino"):
        Device.open(tmp_path / "mine", provider="openvino")


def test_without_it_the_target_is_named(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no engine for target 'counting': this device has .*onnx"
    ):
        Device.init(retargeted(fleet, tmp_path / "bundle", "counting"), tmp_path / "mine")


@pytest.mark.usefixtures("counting")
def test_an_old_generation_is_never_published_over_a_newer_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    device = Device.init(retargeted(fleet, tmp_path / "bundle", "counting"), tmp_path / "mine")
    late = Device.open(tmp_path / "mine")
    device.apply(fleet.packets[0])
    late._publish()
    published = tmp_path / "mine" / "engine" / "published"
    assert published.read_text().split()[-1] == "6"
    published.write_text("")  # as after a power cut between the commit and this
    Device.open(tmp_path / "mine")
    assert published.read_text().split() == ["6"]

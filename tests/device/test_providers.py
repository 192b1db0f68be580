"""Execution providers of ONNX Runtime: equal to the host within the canary's tolerance, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Fleet, Result, images, inputs

from sdlora_edge.device import Device
from sdlora_edge.device.engines import providers
from sdlora_edge.device.engines.providers import PROVIDER, PROVIDERS, named
from sdlora_edge.errors import HealthError, InputError, UsageError

Cli = Callable[..., Result]


def require_openvino() -> None:
    pytest.importorskip("onnxruntime_ep_openvino", reason="no OpenVINO provider is installed")
    if "GenuineIntel" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("OpenVINO knows Intel's processors alone")


@pytest.fixture(scope="module")
def constants(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fleet's bundle with weights that are constants of the model, and room for 20 classes."""
    from sdlora_edge.export.bundles import export_bundle
    from sdlora_edge.export.requests import ExportOptions

    from sdlora_edge.train.run import Run

    out, trust = tmp_path_factory.mktemp("constants") / "bundle", str(fleet.key.with_suffix(".pub"))
    options = ExportOptions(weights_as="constants", max_classes=20)
    export_bundle(Run.open(fleet.run), out, 0, [trust], options)
    return out


def test_openvino_computes_what_the_cpu_computes_after_each_update(
    fleet: Fleet, constants: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_openvino()
    store, openvino = tmp_path / "store", ("--provider", "openvino")
    made = cli("device", "init", "--bundle", constants, "--store", store, *openvino)
    assert made.code == 0, made
    for packet in fleet.packets:
        assert cli("device", "apply", packet, "--store", store, *openvino).code == 0
        ours, plain = Device.open(store, threads=1, provider="openvino"), Device.open(store)
        np.testing.assert_allclose(ours.logits(inputs(ours)), plain.logits(inputs(ours)), atol=1e-4)
        assert [one.label for one in ours.predict(images())] == [
            one.label for one in plain.predict(images())
        ]
    monkeypatch.setenv(PROVIDER, "openvino")
    by_environment = Device.open(store)
    used = by_environment._engine.load(by_environment.current()[1]).session.get_providers()
    assert used[0] == "OpenVINOExecutionProvider"


def test_openvino_refuses_weights_as_inputs_by_name(fleet: Fleet, cli: Cli, tmp_path: Path) -> None:
    require_openvino()
    made = ("--bundle", fleet.bundle, "--store", tmp_path / "store")
    refused = cli("device", "init", *made, "--provider", "openvino")
    assert refused.code == 3
    assert "cannot load it with provider openvino" in refused.err
    assert "export the bundle with --weights-as constants" in refused.err
    assert not (tmp_path / "store").exists()


def test_a_plugin_without_a_processor_is_refused_each_time_and_registered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[str] = []
    library = SimpleNamespace(get_library_path=lambda: "library.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", library)
    monkeypatch.setattr(providers, "_registered", set())
    ort = SimpleNamespace(
        get_ep_devices=lambda: [],
        register_execution_provider_library=lambda name, path: registered.append(name),
    )
    options = SimpleNamespace(
        add_session_config_entry=lambda *entry: None, add_provider_for_devices=lambda *own: None
    )
    for _ in range(2):
        with pytest.raises(InputError, match="qnn finds no processor that it knows: use --prov"):
            PROVIDERS["qnn"].add(ort, options, 1)
    assert registered == ["onnxruntime_qnn"]


def test_another_arithmetic_is_refused_by_the_canary(
    fleet: Fleet, constants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is no provider: it computes something else."""
    from sdlora_edge.device.engines.onnx_runtime import OnnxEngine

    Device.init(constants, tmp_path / "store")
    computed = OnnxEngine.outputs

    def rounded(self: OnnxEngine, loaded: object, given: np.ndarray) -> object:
        found = computed(self, loaded, given)  # type: ignore[arg-type]
        return found._replace(logits=np.round(found.logits, 1))

    monkeypatch.setattr(OnnxEngine, "outputs", rounded)
    monkeypatch.setattr("sdlora_edge.device.engines.providers.PROVIDERS", other())
    with pytest.raises(HealthError, match="use --provider cpu"):
        Device.open(tmp_path / "store", provider="other")


def other() -> dict[str, object]:
    from sdlora_edge.device.engines.providers import Provider

    class Other(Provider):
        def require_used(self, session: object) -> None:
            """It is the CPU in truth."""

    return {"other": Other("other", "CPUExecutionProvider", "other"), **PROVIDERS}


@pytest.mark.parametrize("name", sorted(set(PROVIDERS) - {"cpu", "openvino"}))
def test_a_provider_that_is_not_installed_is_named_with_what_brings_it(
    store: Path, name: str
) -> None:
    with pytest.raises(
        InputError, match=f"no provider {name} here .*install {PROVIDERS[name].package}"
    ):
        Device.open(store, provider=name)


def test_a_provider_that_takes_nothing_is_refused() -> None:
    """ONNX Runtime falls back to its CPU kernels in silence."""
    openvino = PROVIDERS["openvino"]

    def session(providers: list[str], took: list[str]) -> SimpleNamespace:
        parts = [SimpleNamespace(ep_name=name) for name in took]
        return SimpleNamespace(
            get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts
        )

    full, cpu = openvino.full, "CPUExecutionProvider"
    openvino.require_used(session([full, cpu], [full, cpu]))
    openvino.require_used(SimpleNamespace(get_providers=lambda: [full]))  # an older version
    for one in (session([cpu], []), session([full, cpu], [cpu])):
        with pytest.raises(InputError, match="openvino takes no part of this model"):
            openvino.require_used(one)


@pytest.mark.parametrize("way", ["parameter", "environment"])
def test_an_unknown_provider_is_a_usage_error(
    store: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROVIDER, "gpu" if way == "environment" else "")
    with pytest.raises(UsageError, match=r"provider 'gpu' is unknown: choose cpu, cuda, tensorrt"):
        Device.open(store, provider="gpu" if way == "parameter" else "")
    monkeypatch.setenv(PROVIDER, "cuda")
    assert (named("").name, named("cpu").name) == ("cuda", "cpu")
    assert Device.open(store, provider="cpu").status().task == 0

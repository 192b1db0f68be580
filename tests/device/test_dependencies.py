"""What other packages and platforms do to a device: telemetry, platforms that lack something, versions with faults."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
from conftest import Fleet, Result

from sdlora_edge.device import Device
from sdlora_edge.device.engines import onnx_runtime
from sdlora_edge.errors import HealthError, UsageError
from sdlora_edge.platforms import SUPPORTED
from sdlora_edge.train.config import tomllib

ROOT = Path(__file__).resolve().parents[2]
LIFE = """
import sys
from sdlora_edge.cli import main
bundle, folder, packet = sys.argv[1:]
assert main(["device", "init", "--bundle", bundle, "--store", folder + "/s"]) == 0
assert main(["device", "apply", packet, "--store", folder + "/s"]) == 0
"""
CHECK = """
import sys
from sdlora_edge.cli import main
run, bundle = sys.argv[1:]
assert main(["bundle", "check", "--run", run, "--bundle", bundle]) == 0
"""


def python(
    program: str, *arguments: object, home: Path, prefix: tuple[str, ...] = (), **variables: str
) -> str:
    """Runs in a fresh interpreter, with a home of its own and nothing said about telemetry; returns its stderr."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_", "CI"))
    }  # CI makes it quiet by itself
    environment |= {"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1", **variables}
    command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def written(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def traced(trace: Path) -> tuple[str, ...]:
    """A prefix that writes what is done with sockets to a file; the test is skipped where processes cannot be traced."""
    prefix = (
        "strace",
        "--seccomp-bpf",
        "-f",
        "-o",
        str(trace),
        "-e",
        "trace=socket,connect,sendto",
    )
    if (
        not shutil.which("strace")
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("strace is not here, or may not trace")
    return prefix


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_device_writes_nothing_outside_its_store(
    fleet: Fleet, home: Path, tmp_path: Path
) -> None:
    python(LIFE, fleet.bundle, tmp_path, fleet.packets[0], home=home)
    assert written(home) == []


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 29), reason="has no telemetry"
)
def test_without_the_switch_onnxruntime_does(fleet: Fleet, home: Path, tmp_path: Path) -> None:
    """Else the test above proves nothing; and who wants telemetry has it."""
    python(LIFE, fleet.bundle, tmp_path, fleet.packets[0], home=home, ORT_DISABLE_TELEMETRY="0")
    assert any(path.endswith("deviceid") for path in written(home))


def test_a_device_opens_no_socket(fleet: Fleet, home: Path, tmp_path: Path) -> None:
    prefix = traced(tmp_path / "trace")
    python(LIFE, fleet.bundle, tmp_path, fleet.packets[0], home=home, prefix=prefix)
    assert "socket(" not in (tmp_path / "trace").read_text()


def test_the_host_is_as_quiet(fleet: Fleet, home: Path, tmp_path: Path) -> None:
    prefix = traced(tmp_path / "trace")
    python(CHECK, fleet.run, fleet.bundle, home=home, prefix=prefix)
    assert not [path for path in written(home) if "onnxruntime" in path or "deviceid" in path]
    assert not re.search("(connect|sendto).*AF_INET", (tmp_path / "trace").read_text())


def test_who_imports_onnxruntime_first_is_warned(home: Path) -> None:
    assert "import sdlora_edge first" in python("import onnxruntime, sdlora_edge", home=home)
    assert python("import sdlora_edge, onnxruntime", home=home) == ""
    assert python("import onnxruntime, sdlora_edge", home=home, ORT_DISABLE_TELEMETRY="1") == ""


def test_the_docs_name_the_supported_platforms() -> None:
    assert SUPPORTED in " ".join((ROOT / "docs" / "platforms.md").read_text().split())


@pytest.mark.parametrize(
    "program",
    ["from sdlora_edge.cli import main; main()", "import sdlora_edge.__main__ as m; m.main()"],
)
def test_without_file_locks_the_command_says_where_it_runs(program: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['fcntl'] = None; {program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1)
    assert found.stderr.startswith("error: fcntl cannot be imported on this ")
    assert SUPPORTED in found.stderr


def test_without_file_locks_the_api_says_where_it_runs(home: Path) -> None:
    program = f"""
import sys
sys.modules["fcntl"] = None
from sdlora_edge.errors import UsageError
try:
    from sdlora_edge.device import Device
except UsageError as error:
    assert {SUPPORTED!r} in str(error)
else:
    raise AssertionError
"""
    python(program, home=home)


@pytest.mark.parametrize("command", ["init", "export-weights"])
def test_without_onnxruntime_the_command_says_where_it_runs(
    fleet: Fleet, store: Path, tmp_path: Path, command: str
) -> None:
    arguments = {
        "init": ["device", "init", "--bundle", str(fleet.bundle), "--store", str(tmp_path / "new")],
        "export-weights": [
            "device",
            "export-weights",
            "--format",
            "safetensors",
            "--store",
            str(store),
            "--out",
            str(tmp_path / "a.onnx_adapter"),
        ],
    }
    program = f"import sys; sys.modules['onnxruntime'] = None; from sdlora_edge.cli import main; sys.exit(main({arguments[command]}))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    (error,) = (line for line in found.stderr.splitlines() if not line.endswith(" ..."))
    assert found.returncode == 3
    assert error.startswith("error: onnxruntime cannot be imported on this ")
    assert SUPPORTED in found.stderr


LEVELS = [
    ("1.22.1", False),
    ("1.23.0", True),
    ("1.29.0", True),
    ("1.29.1.dev20260101", True),
    ("1.30.0", False),
    ("2.0", False),
]


@pytest.mark.parametrize(("version", "lower"), LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("weights_as", ["inputs", "constants"])
def test_the_optimisation_is_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, version: str, lower: bool, dtype: str, weights_as: str
) -> None:
    """Which versions crash is known by `make matrix` (docs/platforms.md)."""
    engine = onnx_runtime.OnnxEngine.__new__(onnx_runtime.OnnxEngine)
    engine._dtypes, engine._threads = {"w": onnx_runtime.DTYPES[dtype]}, 0
    monkeypatch.setattr(ort, "__version__", version)
    expected = lower and dtype == "float16" and weights_as == "inputs"
    level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if expected
        else ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    assert engine._options(fixed=weights_as == "constants").graph_optimization_level == level


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ort.SessionOptions]:
    def options(text: str) -> ort.SessionOptions:
        monkeypatch.setenv(onnx_runtime.CONFIG, text)
        engine = onnx_runtime.OnnxEngine.__new__(onnx_runtime.OnnxEngine)
        engine._dtypes, engine._threads = {}, 0
        return engine._options(fixed=False)

    return options


def test_the_user_can_add_to_a_sessions_configuration(
    entries: Callable[[str], ort.SessionOptions],
) -> None:
    found = entries("mlas.disable_kleidiai=1  session.x=a=b")
    assert found.get_session_config_entry("mlas.disable_kleidiai") == "1"
    assert found.get_session_config_entry("session.x") == "a=b"
    assert found.get_session_config_entry("session.disable_quant_qdq") == "1"
    for wrong in ("mlas.disable_kleidiai", "=1", "a=", "a=1 b"):
        with pytest.raises(UsageError, match="write NAME=VALUE"):
            entries(wrong)
    with pytest.raises(UsageError, match="ONNX Runtime refuses 'xxx"):
        entries(f"{'x' * 3000}=1")


def test_it_reaches_the_command(
    fleet: Fleet, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(onnx_runtime.CONFIG, "nothing")
    found = cli("device", "init", "--bundle", fleet.bundle, "--store", tmp_path / "store")
    (error,) = (line for line in found.err.splitlines() if not line.endswith(" ..."))
    assert found.code == 2
    assert error.startswith(f"error: {onnx_runtime.CONFIG} holds 'nothing'")
    monkeypatch.setenv(onnx_runtime.CONFIG, "mlas.disable_kleidiai=1")
    assert cli("device", "init", "--bundle", fleet.bundle, "--store", tmp_path / "store").code == 0


@pytest.mark.parametrize(
    ("machine", "precision", "named"),
    [
        ("aarch64", "int8-dynamic", True),
        ("x86_64", "int8-dynamic", False),
        ("aarch64", "int8", False),
    ],
)
def test_a_canary_that_fails_on_arm64_names_the_option(
    fleet: Fleet,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    precision: str,
    named: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    device = Device.open(store)
    object.__setattr__(device.bundle.manifest, "precision", precision)
    device._generations.engine = onnx_runtime.OnnxEngine(device.bundle, 0, store)
    device._live.canary_logits[:] += 1
    with pytest.raises(HealthError) as caught:
        device._generations.check_canary(device._live)
    assert (f"{onnx_runtime.CONFIG}=mlas.disable_kleidiai=1" in str(caught.value)) is named


def test_what_is_declared_is_what_is_imported() -> None:
    """matplotlib was declared and never imported; ExecuTorch's runtime imports torch, and its private names change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {re.split("[<>=]", text)[0] for text in extras["executorch"]} == {"executorch", "torch"}
    assert any("executorch" in text and "<" in text for text in extras["executorch"])
    modules = {"scikit-learn": "sklearn", "tomli-w": "tomli_w"}
    code = "\n".join(
        path.read_text()
        for folder in ("sdlora_edge", "export")
        for path in (ROOT / folder).rglob("*.py")
    )
    for name in {re.split("[<>=;]", text)[0] for text in extras["host"]} - {
        "onnxscript",
        "torchvision",
    }:  # of torch.onnx and timm
        assert re.search(rf"\b(import|from) {modules.get(name, name)}\b", code), name

"""The device side imports neither torch nor anything else of the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Fleet

HOST = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "sklearn",
    "scipy",
    "matplotlib",
    "tqdm",
    "tomli_w",
)


def test_a_whole_device_life_imports_nothing_of_the_host(fleet: Fleet, tmp_path: Path) -> None:
    """Through the command line, in a fresh interpreter in which host packages cannot be imported at all."""
    program = f"""
import sys
for name in {HOST!r}:
    sys.modules[name] = None
sys.modules["cryptography"] = None
import numpy as np
from PIL import Image
from sdlora_edge.cli import main
from sdlora_edge.device import Device
bundle, folder, *packets = sys.argv[1:]
Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(folder + "/p.png")
store = ["--store", folder + "/s"]
for arguments in (
    ["device", "init", "--bundle", bundle, *store],
    ["device", "apply", *packets, *store],
    ["device", "predict", folder + "/p.png", *store],
    ["device", "rollback", *store],
    ["device", "status", *store],
    ["device", "verify", *store],
    ["packet", "verify", packets[0], "--bundle", bundle],
    ["packet", "inspect", packets[0]],
    ["bundle", "inspect", "--bundle", bundle],
    ["device", "export-weights", *store, "--format", "adapter", "--out", folder + "/a.onnx_adapter"],
    ["device", "export-weights", *store, "--format", "safetensors", "--out", folder + "/a.st"],
):
    assert main(arguments) == 0, arguments
assert Device.open(folder + "/s").status().task == len(packets) - 1
assert main(["train"]) == 2, "the host's commands must ask for the host's install"
"""
    arguments = [
        sys.executable,
        "-c",
        program,
        str(fleet.bundle),
        str(tmp_path),
        *map(str, fleet.packets),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sdlora-edge[host]" in done.stderr.splitlines()[-1]


def test_importing_the_package_imports_neither_torch_nor_an_engine() -> None:
    program = "import sys, sdlora_edge, sdlora_edge.device; print([m for m in ('torch', 'onnxruntime', 'timm', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

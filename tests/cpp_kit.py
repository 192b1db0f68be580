"""Compiles the programs of examples/cpp, and runs them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import debian
import numpy as np

from sdlora_edge.device import Device

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "cpp"
# Without contraction: the same roundings as numpy's, on processors that have fused operations.
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
EXECUTORCH = ("", "_backend_xnnpack", "_kernels_optimized", "_threadpool")


@dataclass(frozen=True)
class Toolchain:
    """compiler: its name. wheels: the folder with the packages. options: more, for its libraries."""

    compiler: str
    wheels: Path
    options: tuple[str, ...] = ()

    def onnx(self, out: Path) -> Path:
        header = Path(debian.program("onnxruntime/onnxruntime_cxx_api.h")).parent
        (library,) = (self.wheels / "onnxruntime" / "capi").glob("libonnxruntime.so.*")
        (out / "libonnxruntime.so.1").symlink_to(library)  # the name that the loader looks for
        linked = [str(library), f"-Wl,-rpath,{out}"]
        return self._compiled("onnx", out, [f"-isystem{header}"], linked)

    def executorch(self, out: Path) -> Path:
        package = self.wheels / "executorch"
        headers = package / "include"
        core = headers / "executorch" / "runtime" / "core" / "portable_type" / "c10"
        included = [f"-isystem{headers}", f"-isystem{core}", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
        libraries = [f"-lexecutorch{name}" for name in EXECUTORCH]
        linked = [f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}"]
        return self._compiled(
            "executorch", out, included, [*linked, "-Wl,--no-as-needed", *libraries]
        )

    def _compiled(self, name: str, out: Path, included: list[str], linked: list[str]) -> Path:
        for header in ("nlohmann/json.hpp", "openssl/evp.h"):
            debian.program(header)
        program, source = out / f"{name}_device", EXAMPLES / name / "main.cpp"
        command = [debian.program(self.compiler), *OPTIONS, *included, *self.options]
        command += [str(source), "-o", str(program), *linked, "-lcrypto"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program


def wheels(name: str) -> Path:
    """The folder that this environment's packages lie in."""
    return Path(str(distribution(name).locate_file("")))


class Running:
    """A program that answers one image after the other."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def answer(self, image: Path) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{image}\n")
        self._child.stdin.flush()
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        assert found.pop("image") == str(image)
        return found


@contextmanager
def running(command: list[str], log: Path) -> Iterator[Running]:
    """What it says on stderr is in `log`."""
    with log.open("w") as errors:
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        with child:
            yield Running(child)
    assert child.returncode == 0, log.read_text()


def raw(device: Device, image: np.ndarray, path: Path) -> Path:
    """An image as the programs take it: RGB of the model's own size."""
    path.write_bytes(device._prepare.pixels(image).tobytes())
    return path


def equal(found: dict[str, Any], device: Device, image: np.ndarray, tolerance: float) -> bool:
    """Whether a program's answer is the device's own."""
    ours = device.predict(image)
    assert (found["class"], found["known"]) == (ours.label, ours.known)
    assert found["task"] == device.status().task
    np.testing.assert_allclose(
        [found["probability"], found["score"]], [ours.confidence, ours.score], atol=tolerance
    )
    return ours.known

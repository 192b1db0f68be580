"""An emulated 64-bit ARM machine: a Debian root that is unpacked but never booted, and qemu-user.

No privileges are needed: nothing is mounted, and no handler is registered with the kernel. A guest's
files are looked for in the root first, and then on this machine. `python` below is a script of this
machine, so a guest can start it again by the name in sys.executable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import debian

ROOT = Path(__file__).resolve().parents[1]
ARM = ROOT / "build" / "arm"
RELEASE, PYTHON = "bookworm", "3.11"
PACKAGES = ("python3", "libgomp1", "libstdc++6", "libssl-dev")
PROCESSOR = "cortex-a72"
CPUINFO = """processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
"""A core, as the kernel of such a machine shows it: qemu-user would show this machine's own."""
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


@dataclass(frozen=True)
class Machine:
    """root: Debian's files. wheels: the folder of Python packages. python: runs programs there."""

    root: Path
    wheels: Path
    python: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHOME": "/usr",
            "PYTHONPATH": str(self.wheels),
        }

    def command(self, program: Path | str) -> list[str]:
        """What runs a program there."""
        emulator = debian.program("qemu-aarch64-static")
        return [emulator, "-cpu", PROCESSOR, "-L", str(self.root), str(program)]


def machine() -> Machine:
    """Makes what is missing of it. The test is skipped if a program is."""
    for name in debian.ARM_PACKAGES:
        debian.program(name)
    made = Machine(ARM / "root", ARM / "wheels", ARM / "python")
    if not made.root.exists():
        _unpack(made.root)
    script = [*made.command(made.root / "usr" / "bin" / f"python{PYTHON}")]
    script[1:1] = ["-0", str(made.python)]
    made.python.write_text(f'#!/bin/sh\nexec {" ".join(script)} "$@"\n')
    made.python.chmod(0o755)
    _install(made.wheels)
    return made


def _unpack(root: Path) -> None:
    ARM.mkdir(parents=True, exist_ok=True)
    new = ARM / "new"
    included = ",".join(PACKAGES)
    _run(
        [
            debian.program("mmdebstrap"),
            "--variant=extract",
            "--architectures=arm64",
            f"--include={included}",
            "--format=directory",
            RELEASE,
            str(new),
        ]
    )
    (new / "proc").mkdir(exist_ok=True)
    (new / "proc" / "cpuinfo").write_text("".join(map(CPUINFO.format, range(2))))
    new.rename(root)


def _install(wheels: Path) -> None:
    """The package as it is now, with its dependencies, pytest, and ExecuTorch's libraries."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--only-binary", ":all:"]
    pip += ["--target", str(wheels), "--python-version", PYTHON, "--implementation", "cp"]
    pip += [word for tag in TAGS for word in ("--platform", f"{tag}_aarch64")]
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(ARM),
            str(ROOT),
        ]
    )
    (own,) = ARM.glob("sdlora_edge-*.whl")
    if not (wheels / "onnxruntime").exists():
        _run([*pip, str(own), "pytest"])
    if not (wheels / "executorch").exists():
        _run([*pip, "--no-deps", "executorch>=1.5,<1.6"])
    _run([*pip, "--no-deps", str(own)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"

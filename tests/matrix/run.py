"""`make matrix`: the device suite (device_tests/) in virtual environments of its own, on bundles of every kind.

For each Python 3.10 to 3.13 on PATH or among pyenv's: the oldest versions that pyproject.toml allows, the newest ones, and every
minor version of ONNX Runtime between them. All lies in .matrix/, with what was found, so that a second call goes on where
the first was stopped; a change of the package begins anew. Writes docs/figures/matrix.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench")]
import figures  # noqa: E402
from carried import BUNDLES  # noqa: E402

from sdlora_edge.train.config import tomllib  # noqa: E402

MATRIX = ROOT / ".matrix"
FLEET, CARRIED, FOUND = MATRIX / "fleet", MATRIX / "device_tests", MATRIX / "found.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OLDEST, NEWEST = "oldest", "newest"
SHORT = "not kill_and_reopen and not cost"
"""between oldest and newest: without the checks that kill processes and measure times, most of the suite's time"""
LIMIT = 900
"""seconds for the suite on one bundle"""


@dataclass(frozen=True)
class Cell:
    """One environment. kind: OLDEST, NEWEST, or the version of ONNX Runtime beside the newest of all else."""

    python: str
    kind: str

    @property
    def folder(self) -> Path:
        """The versions between share an environment, in which one replaces the other."""
        return MATRIX / f"{self.python}-{self.kind if self.kind in (OLDEST, NEWEST) else 'between'}"

    @property
    def executable(self) -> Path:
        return self.folder / "bin" / "python"

    def requirements(self) -> list[str]:
        names = ["sdlora-edge", "pytest"]
        if self.kind == OLDEST:
            return [
                *names,
                *(f"{name}=={version}" for name, version in oldest(self.python).items()),
            ]
        return names if self.kind == NEWEST else [*names, f"onnxruntime=={self.kind}"]


def pythons() -> dict[str, Path]:
    """{minor version: interpreter}: on PATH, or the newest of pyenv's."""
    found = {}
    for minor in PYTHONS:
        own = sorted(
            Path.home().glob(f".pyenv/versions/{minor}.*/bin/python{minor}"),
            key=lambda p: version_key(p.parts[-3]),
        )
        if path := shutil.which(f"python{minor}"):
            own.append(Path(path))
        working = [
            p
            for p in own
            if subprocess.run([p, "-c", "import venv, ensurepip"], capture_output=True).returncode
            == 0
        ]
        if working:
            found[minor] = working[-1]
    return found


def version_key(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def oldest(python: str) -> dict[str, str]:
    """{dependency: lowest version that pyproject.toml allows on this Python}."""
    lows: dict[str, str] = {}
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (low,) = [s.version for s in requirement.specifier if s.operator == ">="]
            lows[requirement.name] = max(low, lows.get(requirement.name, low), key=version_key)
    return lows


def minors(python: Path) -> list[str]:
    """The last release of each minor version of ONNX Runtime that this Python can have, without the oldest and the newest."""
    done = subprocess.run(
        [python, "-m", "pip", "index", "versions", "onnxruntime"],
        capture_output=True,
        text=True,
        check=True,
    )
    (listed,) = re.findall(r"Available versions: (.*)", done.stdout)
    last: dict[tuple[int, ...], str] = {}
    for version in listed.split(", "):  # newest first
        last.setdefault(version_key(version)[:2], version)
    lowest = version_key(oldest(PYTHONS[0])["onnxruntime"])[:2]
    return [last[minor] for minor in sorted(last)[:-1] if minor > lowest]


def cells(found: dict[str, Path]) -> Iterator[Cell]:
    for kind in (OLDEST, NEWEST):
        yield from (Cell(minor, kind) for minor in found)
    # each version on one Python first, then on the others
    between = [(version, minor) for minor, path in found.items() for version in minors(path)]
    seen = Counter[str]()
    ranked = []
    for version, minor in between:
        ranked.append((seen[version], version_key(version), Cell(minor, version)))
        seen[version] += 1
    yield from (cell for _, _, cell in sorted(ranked, key=lambda r: r[:2]))


def install(cell: Cell, python: Path, wheel: Path) -> str:
    """What pip says where it fails, on its last line; nothing where all is installed."""
    if not cell.executable.exists():
        subprocess.run([python, "-m", "venv", cell.folder], check=True)
    pip = [
        cell.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
    ]
    own = subprocess.run(
        [*pip, "--no-deps", "--force-reinstall", wheel], capture_output=True, text=True
    )
    all_of_it = (
        subprocess.run([*pip, "--upgrade", *cell.requirements()], capture_output=True, text=True)
        if not own.returncode
        else own
    )
    return (all_of_it.stderr.strip().splitlines() or ["failed"])[-1] if all_of_it.returncode else ""


def versions(cell: Cell) -> dict[str, str]:
    listed = subprocess.run(
        [cell.executable, "-m", "pip", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    known = {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}
    return {name: known[name] for name in oldest(cell.python)}


def suite(cell: Cell, bundle: str) -> str:
    """How many checks passed, and what did not."""
    report = MATRIX / "report.json"
    report.unlink(missing_ok=True)
    command = [
        cell.executable,
        "-m",
        "pytest",
        "-q",
        CARRIED,
        "-p",
        "no:cacheprovider",
        "--report",
        report,
    ]
    command += [
        "--bundle",
        FLEET / "bundles" / bundle.replace(" ", "-"),
        "--packets",
        FLEET / "packets",
        "--expected",
        FLEET / "expected",
    ]
    command += [] if cell.kind in (OLDEST, NEWEST) else ["-k", SHORT]
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=LIMIT, cwd=MATRIX
        )
    except subprocess.TimeoutExpired:
        return f"longer than {LIMIT} s"
    (MATRIX / f"{cell.python}-{cell.kind}-{bundle}.log".replace(" ", "-")).write_text(
        done.stdout + done.stderr
    )
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    checks = json.loads(report.read_text())["checks"] if report.exists() else {}
    failed = [name for name, check in checks.items() if not check["passed"]]
    return f"{len(checks) - len(failed)} of {len(checks)}" + (
        f", not {' '.join(failed)}" if failed else ""
    )


def source() -> str:
    """A digest of what is tested."""
    paths = [
        *(ROOT / "sdlora_edge").rglob("*.py"),
        *(ROOT / "device_tests").glob("*.py"),
        ROOT / "pyproject.toml",
    ]
    return hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(paths))
    ).hexdigest()


def prepare() -> Path:
    """The fleet, the suite, and the wheel, whose path is returned."""
    for folder in (CARRIED, MATRIX / "wheel"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "device_tests", CARRIED, ignore=shutil.ignore_patterns("__pycache__"))
    if not (FLEET / "expected").exists():
        shutil.rmtree(FLEET, ignore_errors=True)
        subprocess.run(
            [sys.executable, ROOT / "tests" / "matrix" / "carried.py", FLEET], check=True
        )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        MATRIX / "wheel",
        ROOT,
    ]
    subprocess.run(build, check=True)
    (wheel,) = (MATRIX / "wheel").glob("*.whl")
    return wheel


def run(cell: Cell, python: Path, wheel: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"python": cell.python, "kind": cell.kind}
    if problem := install(cell, python, wheel):
        return {**facts, "problem": problem}
    return {
        **facts,
        "versions": versions(cell),
        "found": {bundle: suite(cell, bundle) for bundle in BUNDLES},
    }


def passed(row: dict[str, Any]) -> bool:
    return all(
        re.fullmatch(r"([1-9]) of \1", found)
        for found in row.get("found", {"": "no environment"}).values()
    )


def main() -> None:
    MATRIX.mkdir(exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    kept = kept if kept.get("source") == source() else {"source": source(), "cells": {}}
    wheel, interpreters = prepare(), pythons()
    for cell in cells(interpreters):
        key, begin = f"{cell.python} {cell.kind}", time.monotonic()
        if "found" in kept["cells"].get(key, {}):
            continue
        kept["cells"][key] = row = run(cell, interpreters[cell.python], wheel)
        FOUND.write_text(json.dumps(kept, indent=1))
        print(
            f"{key}: {row.get('problem') or list(row['found'].values())} ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
        values = {"bundles": BUNDLES, "cells": [r for r in kept["cells"].values() if "found" in r]}
        figures.write(
            "matrix",
            "make matrix",
            values,
            packages=("torch", "timm", "onnx", "onnxruntime", "numpy"),
        )
    if bad := [key for key, row in kept["cells"].items() if not passed(row)]:
        raise SystemExit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()

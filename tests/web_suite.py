"""Node's tests of web/: npm ci, the fixture that they compare with, tsc, node --test.

Without Node and npm, or without the packages of the lock file, it says so and does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEB, FIXTURE = ROOT / "web", ROOT / "build" / "web"
LOCK, INSTALLED = WEB / "package-lock.json", WEB / "node_modules" / ".package-lock.json"
LEAST = 20
"""the first version of Node that has Ed25519 in WebCrypto and ES2023"""


def missing() -> str:
    """Why the tests cannot run, or "". Installs the packages of the lock file."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node and npm are not here: install Debian's nodejs and npm"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout[1:].split(".")[0]) < LEAST:
        return f"node {version.stdout.strip()} is older than {LEAST}: install a newer one"
    if not INSTALLED.exists() or INSTALLED.stat().st_mtime < LOCK.stat().st_mtime:
        # no scripts: that of onnxruntime-node would download what a GPU needs
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=WEB, check=False).returncode:
            return "npm ci failed, see above"
    return ""


def main() -> int:
    """With --prepare: no tests, and what is missing is an error."""
    prepare = sys.argv[1:] == ["--prepare"]
    if problem := missing():
        print(f"the tests of web/ are skipped: {problem}", file=sys.stderr)
        return int(prepare)
    if not (FIXTURE / "expected.json").exists():
        shutil.rmtree(FIXTURE, ignore_errors=True)
        environment = os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tests/web_fixture.py", FIXTURE]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if prepare:
        return 0
    for command in (["npm", "run", "check"], ["npm", "test"]):
        if code := subprocess.run(command, cwd=WEB, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

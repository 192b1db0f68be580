"""The JavaScript device: vectors, sabotages, its logits beside Python's, and wasm beside native.

The latency is that of a ViT-Tiny of 224 px (random weights: time does not depend on them), for one
image and one thread. `web/test/bench.js` measures; this writes docs/figures/web.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import figures
import random_runs
from sdlora_edge.export.bundles import export_bundle
from sdlora_edge.export.requests import ExportOptions

from sdlora_edge.formats import signing

ROOT = figures.ROOT
BUNDLE = ROOT / "build" / "web_bench"
MODEL, CLASSES, ROUNDS = "vit_tiny_patch16_224", 100, 41


def lines_of_code(folder: Path) -> int:
    """Lines of its modules that hold code: neither blank, nor of a comment alone."""
    texts = (path.read_text() for path in folder.glob("*.js"))
    return sum(len(re.findall(r"(?m)^(?!\s*(?://|/?\*|$)).+", text)) for text in texts)


def make_bundle() -> None:
    if not (BUNDLE / "bundle").exists():
        shutil.rmtree(BUNDLE, ignore_errors=True)
        run = random_runs.make_run(MODEL, BUNDLE / "run", 0, CLASSES)
        _, public = signing.new_key("bench", BUNDLE / "keys")
        export_bundle(run, BUNDLE / "bundle", 0, [str(public)], ExportOptions(runs_in="web"))


def main() -> None:
    subprocess.run([sys.executable, ROOT / "tests" / "web_suite.py", "--prepare"], check=True)
    make_bundle()
    command = ["node", "--no-warnings", "test/bench.js", BUNDLE / "bundle", str(ROUNDS)]
    done = subprocess.run(command, cwd=ROOT / "web", check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    node = subprocess.run(["node", "--version"], check=True, stdout=subprocess.PIPE, text=True)
    lock = json.loads((ROOT / "web" / "package-lock.json").read_text())["packages"]
    names = ("onnxruntime-node", "onnxruntime-web")
    found |= {
        "lines": lines_of_code(ROOT / "web" / "src"),
        "model": MODEL,
        "rounds": ROUNDS,
        "node": node.stdout.strip(),
        "npm": {name: lock[f"node_modules/{name}"]["version"] for name in names},
    }
    figures.write("web", "make bench-web", found)


if __name__ == "__main__":
    main()

"""Trainings of a benchmark: two at once, one core each, and what each found is kept in a file that is committed.

So a benchmark of hours goes on where it was stopped, also on another machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any


def kept(path: Path) -> dict[str, Any]:
    """{key: what that training found}."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def train(path: Path, keys: Iterable[str], one: Callable[[str], dict[str, Any]]) -> None:
    """Call `one` for each key that `path` lacks, and write what it returns there. {"heads": {row: {"last": ..}}} is printed."""
    runs, lock = kept(path), Lock()

    def job(key: str) -> None:
        found = one(key)
        with lock:
            everything = kept(path) | {key: found}  # another process may have added some
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
            partial.replace(path)
        last = {head: round(columns["last"], 1) for head, columns in found["heads"].items()}
        print(key, last, flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, [key for key in keys if key not in runs]))


def call(key: str, *program: str) -> str:
    """What a Python program prints, in a process with one thread. Stops the benchmark if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{key}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout

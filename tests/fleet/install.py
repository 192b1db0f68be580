"""Installs the Debian packages of `debian.PACKAGES`, if this is Debian and the user is root.

Arguments are names of programs; without any, those that `make test-fleet` needs.
Whatever cannot be installed is named; its tests are skipped. No service is started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import debian

POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks it before a package starts a service."""


def missing(programs: Iterable[str]) -> list[str]:
    return sorted({debian.PACKAGES[name] for name in programs if not debian.found(name)})


@contextmanager
def nothing_started() -> Iterator[None]:
    """Without a policy of the machine's own, one that refuses every service."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def apt(*words: str) -> bool:
    """Whether apt-get did it; if not, the last lines of its output are shown."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile("w+") as log:
        command = ["apt-get", "--quiet", "--yes", *words]
        done = subprocess.run(command, stdout=log, stderr=log, check=False, env=environment)
        if done.returncode:
            log.seek(0)
            print(*log.read().splitlines()[-5:], sep="\n", file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    programs = sys.argv[1:] or debian.PACKAGES.keys() - {"node", "npm"}
    if not (wanted := missing(programs)):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"not root, or not Debian: {', '.join(wanted)} cannot be installed", file=sys.stderr)
        return
    apt("update")
    with nothing_started():
        for package in wanted:  # one by one: a release may lack one of them
            apt("install", "--no-install-recommends", "--no-upgrade", package)
    if left := missing(programs):
        print(f"not installed: {', '.join(left)}", file=sys.stderr)


if __name__ == "__main__":
    main()

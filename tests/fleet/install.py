"""Installs the Debian packages that `make test-fleet` needs, if this is Debian and the user is root.

With `arm` or `web`, what `make test-arm` or `make test-web` needs. Whatever cannot be installed is
named; its tests are skipped. No service is started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import debian

POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks it before a package starts a service."""


LATER = {"libonnxruntime-dev": "trixie"}
"""The first release that has a package of headers. On an earlier one they are unpacked into
`debian.UNPACKED`: they belong to no library there, so nothing is installed."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def missing(packages: dict[str, str]) -> list[str]:
    return sorted({package for name, package in packages.items() if not debian.found(name)})


@contextlib.contextmanager
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


def apt(*words: str, cwd: str | None = None) -> bool:
    """Whether apt-get did it; if not, the last lines of its output are shown."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile("w+") as log:
        command = ["apt-get", "--quiet", "--yes", *words]
        done = subprocess.run(
            command, stdout=log, stderr=log, check=False, env=environment, cwd=cwd
        )
        if done.returncode:
            log.seek(0)
            print(*log.read().splitlines()[-5:], sep="\n", file=sys.stderr)
    return done.returncode == 0


def mirror() -> str | None:
    """Where this machine gets Debian's packages."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    command += ["Origin: Debian", "Label: Debian"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return found[0] if found else None


def unpack(package: str, release: str) -> None:
    """A package of a later release, if this is Debian."""
    if not (uri := mirror()):
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lists/partial", "cache/archives/partial"):
            Path(folder, name).mkdir(parents=True)
        sources = Path(folder, "sources.list")
        sources.write_text(f"deb [signed-by={KEYRING}] {uri} {release} main\n")
        places = {"Etc::SourceList": sources, "Etc::SourceParts": "/dev/null"}
        places |= {"State::Lists": f"{folder}/lists", "Cache": f"{folder}/cache"}
        options = [word for k, v in places.items() for word in ("--option", f"Dir::{k}={v}")]
        options += ["--option", "APT::Sandbox::User=root"]  # the folder is root's alone
        if apt(*options, "update") and apt(*options, "download", package, cwd=folder):
            (deb,) = Path(folder).glob("*.deb")
            debian.UNPACKED.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "--extract", deb, debian.UNPACKED], check=True)


def main() -> None:
    packages = debian.GROUPS[sys.argv[1] if sys.argv[1:] else "fleet"]
    if not (wanted := missing(packages)):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"not root, or not Debian: {', '.join(wanted)} cannot be installed", file=sys.stderr)
        return
    apt("update")
    with nothing_started():
        for package in wanted:  # one by one: a release may lack one of them
            apt("install", "--no-install-recommends", "--no-upgrade", package)
    for package in missing(packages):
        if package in LATER:
            unpack(package, LATER[package])
    if left := missing(packages):
        print(f"not installed: {', '.join(left)}", file=sys.stderr)


if __name__ == "__main__":
    main()

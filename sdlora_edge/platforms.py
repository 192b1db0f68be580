"""Where this package runs."""

from __future__ import annotations

import platform

SUPPORTED = (
    "sdlora-edge runs on Linux with glibc 2.28 or newer, on x86-64 and ARM64 (aarch64). "
    "It does not run on armv7, with musl (Alpine), on riscv64, or on Windows."
)


def cannot_import(error: ImportError) -> str:
    """What a user reads if something is missing that an install on a supported platform has."""
    machine = f"{platform.system()} {platform.machine()}"
    return (
        f"{error.name or 'a library'} cannot be imported on this {machine} machine ({error}): "
        f"install sdlora-edge again, on a supported platform: {SUPPORTED}"
    )

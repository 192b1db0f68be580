"""Where this package runs."""

from __future__ import annotations

import platform

SUPPORTED = (
    "sdlora-edge runs on Linux with glibc 2.28 or newer, on x86-64 and aarch64 (ARM64); "
    "not on armv7, not with musl (Alpine), not on riscv64, not on Windows"
)


def cannot_import(error: ImportError) -> str:
    """What a user reads where something is missing that every supported platform has."""
    return f"{error.name or 'a library'} cannot be imported on this {platform.system()} {platform.machine()} ({error}): {SUPPORTED}"

"""The command `sdlora-edge`, also as `python -m sdlora_edge`."""

from __future__ import annotations

import json
import sys

from .shortage import require_memory, shortage

IMPORTS = 128 << 20
"""bytes of address space that a device's imports take at least"""


def main() -> int:
    try:
        require_memory(IMPORTS)  # numpy's OpenBLAS ends the process if it gets too little
        from .cli import main as command
    except Exception as error:
        if (found := shortage(error)) is None:
            raise
        print(f"error: {found}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"error": found.to_dict()}))
        return found.exit_code
    return command()


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m sdlora_edge` is the command `sdlora-edge`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())

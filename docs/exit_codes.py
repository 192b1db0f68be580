"""Writes the table of docs/reference/exit-codes.md from the tree in sdlora_edge/errors.py.

`python docs/exit_codes.py`; tests/test_docs.py fails if the page is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdlora_edge import errors

PAGE = Path(__file__).with_name("reference") / "exit-codes.md"


def rendered() -> str:
    """The page, with its table made anew."""
    lines = re.findall(r"(\w+) +(\d) +(\S.*)", errors.__doc__ or "")
    rows = [f"| {code} | `{name}` | {meaning} |" for name, code, meaning in lines]
    done = "| 0 | | done; of several files, some may have needed nothing |"
    table = "\n".join(["| code | error | meaning |", "| ---: | --- | --- |", done, *rows])
    marked = re.compile(r"(<!-- exit-codes -->\n).*?(<!-- /exit-codes -->)", re.S)
    return marked.sub(lambda m: f"{m[1]}{table}\n{m[2]}", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(rendered())

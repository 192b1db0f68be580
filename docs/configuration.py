"""Writes docs/configuration.md from the declarations of the settings.

`python docs/configuration.py`; tests/cli/test_options.py fails if the page is out of date.
"""

from __future__ import annotations

from pathlib import Path

from sdlora_edge.inputs.text import Tokenization
from sdlora_edge.train.declaration import Setting
from sdlora_edge.train.settings import DIGITS_DEFAULTS, GROUPS, SETTINGS

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

`sdlora-edge train` takes each setting below from a flag, from a TOML file (`--config FILE`), or
from a preset (`--preset NAME`). Flags win over the file, and the file wins over the preset. The run
keeps the resolved settings in its `config.toml`, which serves as `--config` of another run too.

A setting has the same name everywhere: `lr` is the key `lr` in the table `[training]`, the flag
`--lr`, and `settings.training.lr` in Python. Switches have two flags:
`--strict` and `--no-strict`.

```toml
[data]
data = "images"
tasks = 2

[training]
epochs = 20
```

Without `data`, a run learns the built-in digits, and these defaults differ: DIGITS.

If the backbone reads texts, these differ: TEXTS.
"""
TABLE = "| key | default | values | meaning |\n| --- | --- | --- | --- |"


def rendered() -> str:
    """The page."""
    head = HEAD
    for word, own in (("DIGITS", DIGITS_DEFAULTS), ("TEXTS", Tokenization.defaults)):
        shown = ", ".join(f"`{name} = {_toml(value)}`" for name, value in own.items())
        head = head.replace(word, shown)
    parts = [head]
    for group, table in GROUPS.items():
        rows = [_row(setting) for setting in SETTINGS.values() if setting.group == group]
        parts.append("\n".join([f"## [{group}]", "", f"{table.__doc__}", "", TABLE, *rows, ""]))
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    values = str(setting.bound or "") or ", ".join(f"`{word}`" for word in setting.choices)
    default = _toml(setting.default)
    meaning = setting.help.replace("<", "&lt;")
    return f"| `{setting.name}` | `{default}` | {values or _kind(setting)} | {meaning} |"


def _kind(setting: Setting) -> str:
    return "`true`, `false`" if setting.kind is bool else "a text"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}"
    return "[]" if value == () else f'"{value}"'


if __name__ == "__main__":
    PAGE.write_text(rendered())

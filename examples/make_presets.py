"""Write presets/NAME.toml for each preset of the program: python examples/make_presets.py"""

from __future__ import annotations

import json
from pathlib import Path

from sdlora_edge.train.presets import PRESETS, preset
from sdlora_edge.train.settings import GROUPS, SETTINGS

FOLDER = Path(__file__).with_name("presets")


def toml(name: str) -> str:
    """The preset as a settings file. What it does not name keeps its default."""
    values = preset(name)
    lines = [f"# sdlora-edge train --config examples/presets/{name}.toml --data-root FOLDER"]
    for group in GROUPS:
        keys = [s.name for s in SETTINGS.values() if s.group == group and s.name in values]
        lines += ["", f"[{group}]"] if keys else []
        lines += [f"{key} = {json.dumps(values[key])}" for key in keys]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PRESETS:
        (FOLDER / f"{name}.toml").write_text(toml(name))

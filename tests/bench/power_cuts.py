"""Cut the power at every point of every scenario, kill the process at every operation before that, and count.

`make bench-faults` writes docs/figures/faults.json; nothing is sampled, so the counts are the same every time.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import SMALL, make_fleet
from faults.scenarios import NAMES, Fixture

PACKAGES = ("onnxruntime", "numpy", "securesystemslib")


def main() -> None:
    logging.getLogger("sdlora_edge").setLevel(
        logging.ERROR
    )  # most restarts warn of what the cut has damaged
    rows, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        fixture = Fixture(make_fleet(Path(folder) / "fleet", dict(SMALL)), Path(folder))
        for name, scenario in fixture.scenarios().items():
            plain = fixture.play(scenario)
            killed = (
                []
                if name == "init"
                else [fixture.play(scenario, n) for n in range(1, plain.operations + 1)]
            )
            plays = [plain, *killed]
            problems += [f"{name}: {problem}" for play in plays for problem in play.problems]
            rows.append(
                {
                    "scenario": name,
                    "operations": plain.operations,
                    "points": plain.points,
                    "states": plain.states,
                    "points_after_a_kill": sum(play.points for play in killed),
                    "states_after_a_kill": sum(play.states for play in killed),
                    "restarts": sum(play.restarts for play in plays),
                    "problems": sum(len(play.problems) for play in plays),
                }
            )
            print(rows[-1], file=sys.stderr)
    assert [row["scenario"] for row in rows] == list(NAMES)
    figures.write("faults", "make bench-faults", {"scenarios": rows}, packages=PACKAGES)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()

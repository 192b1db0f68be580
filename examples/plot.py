"""Draw a run's accuracy over its tasks as an SVG file: python examples/plot.py RUN OUT.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 360, 48


def drawn(accuracies: list[float]) -> str:
    """A line with a point for each task. accuracies: 0 to 1, on test images of all classes."""
    step = (WIDTH - 2 * MARGIN) / max(1, len(accuracies) - 1)
    bottom = HEIGHT - MARGIN
    points = [(MARGIN + i * step, bottom - a * (bottom - MARGIN)) for i, a in enumerate(accuracies)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2a6"/>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{100 * a:.1f} %</text>'
        f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{i}</text>'
        for i, ((x, y), a) in enumerate(zip(points, accuracies))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<text x="{MARGIN}" y="24" font-size="16">Accuracy after each task, all classes</text>'
        f'<polyline points="{line}" fill="none" stroke="#2a6" stroke-width="2"/>{marks}</svg>\n'
    )


def main(run: str, out: str) -> None:
    newest = max(Path(run).glob("tasks/*/metrics.json"))
    accuracies = json.loads(newest.read_text())["accuracy"]
    Path(out).write_text(drawn(accuracies))
    print(f"{out}: {len(accuracies)} points, {100 * accuracies[-1]:.1f} % after the last task")


if __name__ == "__main__":
    main(*sys.argv[1:])

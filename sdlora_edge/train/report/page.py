"""The report as one HTML page that fetches nothing and runs no script.

`page.html` is its template, `parts.html` holds the macros, `style.css` the style. Jinja escapes
every value. Numbers stand in the cells and beside the bars: colour is never the only carrier.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from . import charts, diagrams, heatmaps, tables
from .charts import Chart, Series, Texts
from .heatmaps import HeatMap
from .summary import Summary
from .tables import percent
from .thumbnails import Confused

SCORES = {
    "last": ("last accuracy", "over all classes, after the last task"),
    "average_anytime": (
        "average anytime",
        "mean over tasks of the accuracy on all classes seen by then",
    ),
    "forgetting": ("forgetting", "mean fall of a task from its best; lower is better"),
    "backward_transfer": (
        "backward transfer",
        "mean change of a task since it was learned; higher is better",
    ),
}
"""name and meaning of each score"""


def render(run: Summary, confused: Sequence[Confused] | None = None) -> str:
    """The page of a run as HTML.

    Args:
        run: What the page shows.
        confused: Confused test images; None leaves out their section.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": tables.percent, "size": size, "few_images": tables.few}
    style = (folder / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        run=run,
        confused=confused,
        scores=SCORES,
        style=Markup(style),  # noqa: S704 our own file
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        subject=_subject(run),
        accuracy=_accuracy(run),
        losses=_losses(run),
        matrix=heatmaps.accuracy_matrix(run),
        reliability=run.calibration and diagrams.reliability_diagram(run.calibration),
        magnitudes=heatmaps.magnitudes(run),
        confusion_matrix=_confusion_matrix(run),
        tables=tables,
        missing=tables.MISSING,
    )


def _subject(run: Summary) -> str:
    """What was trained on what. The settings name the whole path of the dataset."""
    known = {name: value for group in run.settings.values() for name, value in group.items()}
    return f"{known['backbone']} on {Path(str(known['data'])).name}, seed {known['seed']}"


def _accuracy(run: Summary) -> Chart:
    places = [task.task for task in run.tasks]
    own = tuple(task.accuracy for task in run.tasks)
    frozen = tuple(task.frozen for task in run.tasks)
    named = [("this run", "own", own)]
    if any(value is not None for value in frozen):
        named.append(("frozen backbone with its own aligned head", "frozen", frozen))
    series = [
        Series(
            f"{name}: {percent(values[-1])} % after the last task",
            style,
            values,
            tuple(
                f"{name} after task {task.task}: {percent(value)} % of {task.images} test images"
                for task, value in zip(run.tasks, values)
            ),
        )
        for name, style, values in named
    ]
    described = ". ".join(
        f"{name}: " + ", ".join(f"task {t} {percent(v)} %" for t, v in zip(places, values))
        for name, _, values in named
    )
    scale = charts.fractions([*own, *frozen])
    return charts.chart(Texts("Accuracy over tasks", described, "task"), places, scale, series)


def _losses(run: Summary) -> Chart | None:
    """The loss of each epoch, a line for each task; None if the run did not record losses."""
    tasks = [task for task in run.tasks if task.losses]
    if not tasks:
        return None
    series = [
        Series(
            tables.short(tables.title(task), 40),
            f"age{math.ceil(10 * (i + 1) / len(tasks))}",
            task.losses,
            tuple(
                f"task {task.task}, epoch {epoch}: loss {loss:.4g}"
                for epoch, loss in enumerate(task.losses, 1)
            ),
        )
        for i, task in enumerate(tasks)
    ]
    described = ". ".join(
        f"Task {task.task}: {task.losses[0]:.4g} in the first epoch, {task.losses[-1]:.4g} in the"
        f" last of {len(task.losses)}"
        for task in tasks
    )
    epochs = range(1, 1 + max(len(task.losses) for task in tasks))
    scale = charts.from_zero([loss for task in tasks for loss in task.losses])
    return charts.chart(Texts("Training loss", described, "epoch"), epochs, scale, series)


def _confusion_matrix(run: Summary) -> HeatMap | None:
    """None if the run did not record its confusions, or has none."""
    if not run.per_class or not run.confusions:
        return None
    return heatmaps.confusion_matrix(run.per_class, run.confusions)


def size(count: int) -> str:
    """Bytes in a unit that fits; 1 kB is 1000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"

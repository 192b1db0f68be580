"""`sdlora-edge eval`: a run's state on any folder of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..progress import stage
from . import arguments
from .output import Json, Line, emit, spaced, table

if TYPE_CHECKING:
    from ..train.evaluator import Evaluation


def evaluate(
    data: arguments.Data,
    run: arguments.Run = None,
    task: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="State to score: 0 is before the first task. Default: the last."
        ),
    ] = None,
    max_megapixels: arguments.RunMegapixels = None,
    json: Json = False,
) -> None:
    """Score a run on a folder of images.

    Shows accuracy, accuracy of each class, the worst confusions, and HTER if the run has two
    classes. If the data has train/ and test/, only test/ counts.
    """
    from ..train import folder, plan

    path = run or folder.newest()
    source = plan.evaluation(path, data, task, max_megapixels)
    with stage("scoring images"):
        from ..train import evaluator  # torch, which takes seconds, comes after the checks
        from ..train.run import Run

        value = evaluator.evaluate(Run.open(path), data, task, source)
    emit(value, json, lambda: _text(value))


def _text(value: Evaluation) -> list[Line]:
    """Paragraphs: the accuracy, the classes, the worst confusions, and HTER for two classes."""
    by_class = sorted(value.per_class.items(), key=lambda item: item[1][0] / item[1][1])
    rows = [
        [name, f"{100 * right / total:.1f} %", str(right), str(total)]
        for name, (right, total) in by_class
    ]
    share = f"{value.correct} of {value.total}"
    parts: list[list[Line]] = [
        [
            f"accuracy {100 * value.accuracy:.2f} % ({share}) after task {value.task}; "
            f"images: {value.images}"
        ],
        table(["class, worst first", "accuracy", "correct", "images"], rows),
    ]
    if value.confusions:
        confusions = [[t, p, str(n)] for t, p, n in value.confusions[:10]]
        parts.append(table(["worst confusions", "taken for", "times"], confusions))
    if found := value.hter:
        rates = f"FAR {100 * found.far:.2f} %, FRR {100 * found.frr:.2f} %"
        parts.append(
            [
                f"HTER {100 * found.hter:.2f} % (lower is better): {rates}. "
                f"The genuine class is {found.genuine}: an image is accepted if its logit minus "
                f"the other's is at least {found.threshold:g}, which equals argmax"
            ]
        )
    elif value.classes == 2:
        parts.append(["no HTER: it needs images of both classes"])
    return spaced(parts)

"""`sdlora-edge eval`: a run's state on any folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..progress import stage
from . import arguments
from .output import Json, Line, emit, spaced, table

if TYPE_CHECKING:
    from ..train.evaluator import Evaluation
    from ..train.reliability import Acceptance, Calibration

NAMED = 5
"""classes that a warning names"""


def evaluate(
    data: arguments.Data,
    run: arguments.Run = None,
    task: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="State to score: 0 is before the first task. Default: the last."
        ),
    ] = None,
    unknown: Annotated[
        Optional[str],
        typer.Option(
            metavar="FOLDER",
            help="Folder or ZIP of images that the model should answer with unknown. Class folders "
            "are optional; those of known classes are left out.",
        ),
    ] = None,
    max_megapixels: arguments.RunMegapixels = None,
    json: Json = False,
) -> None:
    """Score a run on a folder of images.

    Shows accuracy, calibration, the share of images that count as known, recall of each class, the
    worst confusions, and HTER if the run has two classes. If the data has train/ and test/, only
    test/ counts.
    """
    from ..train import folder, plan

    path = run or folder.newest()
    source = plan.evaluation(path, data, task, max_megapixels)
    others = plan.unknown(path, unknown, task, max_megapixels) if unknown is not None else None
    with stage("scoring images"):
        from ..train import evaluator  # torch, which takes seconds, comes after the checks
        from ..train.run import Run

        value = evaluator.evaluate(Run.open(path), data, task, source, others)
    emit(value, json, lambda: _text(value, source.noun))


def _text(value: Evaluation, noun: str) -> list[Line]:
    """Paragraphs: accuracy and certainty, the classes, the worst confusions, HTER, warnings."""
    share = f"{value.correct} of {value.total}"
    parts: list[list[Line]] = [
        [
            f"accuracy {100 * value.accuracy:.2f} % ({share}) after task {value.task}; "
            f"{noun}s: {value.images}",
            _calibration(value.calibration),
            *_unknown(value.unknown, noun),
        ],
        _classes(value, noun),
    ]
    if value.confusions:
        confusions = [[t, p, str(n)] for t, p, n in value.confusions[:10]]
        parts.append(table(["worst confusions", "taken for", "times"], confusions))
    if found := value.hter:
        rates = f"FAR {100 * found.far:.2f} %, FRR {100 * found.frr:.2f} %"
        parts.append(
            [
                f"HTER {100 * found.hter:.2f} % (lower is better): {rates}. "
                f"The genuine class is {found.genuine}: an answer is genuine if its logit minus "
                f"the other's is at least {found.threshold:g}, which equals argmax"
            ]
        )
    elif value.classes == 2:
        parts.append([f"no HTER: it needs {noun}s of both classes"])
    return spaced([*parts, *_thresholds(value.unknown), *_few(value, noun)])


def _calibration(found: Calibration) -> str:
    return (
        f"calibration error (ECE) {100 * found.ece:.2f} %, lower is better: the mean probability "
        f"of the answers is {100 * found.confidence:.1f} %, and {100 * found.accuracy:.1f} % are "
        f"correct; temperature {found.temperature:.3g}"
    )


def _unknown(found: Acceptance, noun: str) -> list[Line]:
    """What is accepted as known, of these images and of unknown ones."""
    from ..train.reliability import Rejection

    if found.threshold is None:
        lines: list[Line] = ["unknown: never answered after this task, which has no threshold"]
    else:
        lines = [
            f"unknown: {100 * found.accepted:.1f} % of these {noun}s are accepted as known, "
            f"by a score of at least {found.threshold:.4g}"
        ]
    if not isinstance(found, Rejection):
        return lines
    left_out = f"; known classes left out: {', '.join(found.left_out)}" if found.left_out else ""
    lines.append(
        f"unknown {noun}s: {100 * found.false_accept:.1f} % of {found.images} are accepted, AUROC "
        f"{100 * found.auroc:.1f} %; {noun}s: {found.data}{left_out}"
    )
    return lines


def _thresholds(found: Acceptance) -> list[list[Line]]:
    """A table of thresholds to choose from, if there are unknown images."""
    from ..train.reliability import Rejection

    if not isinstance(found, Rejection):
        return []
    rows = [
        [f"{t.threshold:.4g}", f"{100 * t.accepted:.1f} %", f"{100 * t.false_accept:.1f} %"]
        for t in found.thresholds
    ]
    return [table(["threshold", "accepts of known", "accepts of unknown"], rows)]


def _classes(value: Evaluation, noun: str) -> list[Line]:
    rows = []
    for name, share in value.recall.items():
        right, total = value.per_class[name]
        rows.append([name, f"{100 * share:.1f} %", str(right), str(total)])
    return table(["class, worst first", "recall", "correct", f"{noun}s"], rows)


def _few(value: Evaluation, noun: str) -> list[list[Line]]:
    """Warnings of classes with too few images."""
    from ..train.metrics import FEW

    found: list[Line] = []
    if few := value.few.test:
        found.append(
            f"warning: fewer than {FEW} test {noun}s, so recall is coarse: {_counts(few)}: add "
            f"test {noun}s"
        )
    if few := value.few.training:
        found.append(f"warning: fewer than {FEW} training {noun}s: {_counts(few)}: add {noun}s")
    return [found] if found else []


def _counts(few: Mapping[str, int]) -> str:
    shown = [f"{name} {images}" for name, images in few.items()]
    return ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if shown[NAMED:] else "")

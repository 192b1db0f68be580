"""`sdlora-edge train`: a new run, one more task of a run, or the rest of a run that was stopped."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import UsageError
from .options import with_settings
from .output import Json, Line, emit, facts, output, say, table

if TYPE_CHECKING:
    from ..train.plan import ClassChanges
    from ..train.run import Run
    from ..train.settings import Settings
    from ..train.source import Source

ROW_HEADS = (
    f"{'task':>4} {'name':16} {'classes':>7} {'seconds':>8} {'tested':>11} {'all %':>5}"
    " | % of each task so far"
)


@with_settings
def train(
    flags: dict[str, Any],
    preset: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Settings of a published experiment, such as imagenet-r-10 or "
            "authors-imagenet-r-10. A file and flags win over it.",
        ),
    ] = None,
    config: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="TOML file with settings, such as config.toml of a run. Flags win over it.",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            callback=output, metavar="FOLDER", help="Folder of the new run. Default: runs/<time>."
        ),
    ] = None,
    run: Annotated[
        Optional[Path],
        typer.Option(
            metavar="RUN",
            help="Existing run: learn ONE more task if there is --data, --retire or --rename; else "
            "resume it.",
        ),
    ] = None,
    name: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="Name of the task that is added. Default: the folder's."),
    ] = None,
    retire: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="CLASS",
            help="Never answer with this class of --run again; repeat it for several.",
        ),
    ] = None,
    rename: Annotated[
        Optional[list[str]],
        typer.Option(metavar="OLD=NEW", help="Rename a class of --run; repeat it for several."),
    ] = None,
    json: Json = False,
) -> None:
    """Learn a stream of classes task by task, keeping no image of an earlier task.

    Several GPUs: torchrun --nproc-per-node N -m -- sdlora_edge train ...
    """
    own = {"preset": preset, "config": config, "out": out}
    if run is None:
        _refuse({"name": name, "retire": retire, "rename": rename}, "give --run RUN too")
        done = _new(settings_of(preset, config, flags), out, json)
    else:
        kept = {flag: value for flag, value in flags.items() if flag not in ("data", "strict")}
        _refuse(own | kept, "a run keeps the settings it was begun with: leave it out")
        done = _more(run, flags, name, class_changes(retire, rename), json)
    from ..train import distributed
    from ..train.trained import Trained

    if distributed.first():
        emit(Trained.of(done), json, lambda: _summary(done))


def _refuse(flags: Mapping[str, Any], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(sorted(given))}: {why}")


def settings_of(preset: str | None, config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Return settings from a preset, a TOML file and flags; the later win over the earlier."""
    from ..train.config import resolve
    from ..train.presets import preset as values_of

    return resolve(config, flags, values_of(preset) if preset else None)


def class_changes(retire: Sequence[str] | None, rename: Sequence[str] | None) -> ClassChanges:
    """Return what --retire and --rename ask for. Raises UsageError unless it is OLD=NEW."""
    from ..train.plan import ClassChanges

    renamed: dict[str, str] = {}
    for text in map(_composed, rename or ()):
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--rename {text!r}: write OLD=NEW, such as --rename cat=tomcat")
        if old in renamed:
            raise UsageError(f"--rename names {old!r} twice: leave one out")
        renamed[old] = new
    return ClassChanges(tuple(dict.fromkeys(map(_composed, retire or ()))), renamed)


def _composed(text: str) -> str:
    """Return the text as class names are kept (NFC), however the terminal composes letters."""
    return unicodedata.normalize("NFC", text)


def _new(settings: Settings, out: Path | None, json: bool) -> Run:
    from ..train import plan

    source = plan.new_run(settings, out)
    from ..train import loop  # torch, which takes seconds, comes after the checks

    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        say(*header(settings, source), err=True)
    return loop.train(settings, out, reporting(json), source)


def _more(
    run: Path, flags: Mapping[str, Any], name: str | None, changes: ClassChanges, json: bool
) -> Run:
    from ..train import plan

    data, strict = flags.get("data"), flags.get("strict")
    if strict is not None and data is None:
        raise UsageError("--strict is about the data of a new task: give --data too")
    if data is None and not changes:
        _refuse({"name": name}, "it names a task that is added: give --data too")
        asked = plan.resumed(run)
        from ..train import loop

        return loop.resume(run, reporting(json), asked)
    task = replace(plan.one_more(run, data, name, changes), strict=strict)
    from ..train import loop

    return loop.learn(task, reporting(json))


def header(settings: Settings, source: Source) -> list[Line]:
    """Return what is about to be trained: model, device, classes, images and tasks."""
    from ..method import backbones

    train, test = (sum(len(own) for own in side.values()) for side in (source.train, source.test))
    shown = {
        "model": settings.backbone.backbone,
        "device": str(backbones.resolve_device(settings.training.device)),
        "classes": len(source.classes),
        f"{source.noun}s": f"{train} for training, {test} for testing, from {source.name}",
        "tasks": settings.data.tasks,
    }
    return facts(shown, *shown)


def reporting(json: bool) -> Callable[[Run], None]:
    """Return what prints the row of each task, and the column heads above the first one."""
    heads = [ROW_HEADS]

    def report(progress: Run) -> None:
        from ..train import distributed

        if not json and distributed.first():
            say(*heads, accuracy_row(progress))
            heads.clear()

    return report


def accuracy_row(run: Run) -> str:
    """Return a line of the growing table, under `ROW_HEADS`: accuracies in percent."""
    entry = run.metrics[-1]
    cells = [
        "-" if c is None else f"{100 * c / n:.1f}" if n else "no test"
        for c, n in zip(entry["correct"][-1], entry["totals"])
    ]
    whole = f"{100 * entry['accuracy'][-1]:.1f}" if "accuracy" in entry else "-"
    return (
        f"{entry['task']:>4} {entry['name'][:16]:16} {len(entry['classes']):>7}"
        f" {entry['seconds']:>8.1f} {sum(entry['totals']):>11} {whole:>5} | {' '.join(cells)}"
    )


def _summary(run: Run) -> list[Line]:
    entry = run.metrics[-1]
    names = ("last", "average_anytime", "forgetting", "backward_transfer")
    scores = [[n.replace("_", " "), f"{100 * entry[n]:.2f} %"] for n in names if n in entry]
    if found := entry.get("calibration"):
        scores.append(["calibration error (ECE)", f"{100 * found['ece']:.2f} %"])
    if found := entry.get("unknown"):
        scores.append(["accepted as known", f"{100 * found['accepted']:.2f} %"])
    heads = [f"score on {sum(entry['totals'])} test {run.preprocessing.noun}s", "value"]
    return [*(table(heads, scores) if scores else []), f"run: {run.path}"]

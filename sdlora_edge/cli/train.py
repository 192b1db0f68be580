"""`sdlora-edge train`: a new run, one more task of a run, or the rest of a run that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..errors import UsageError
from .output import Json, emit, table

if TYPE_CHECKING:
    from ..train.run import Run


def _numbers(text: str, name: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text!r}: give three numbers, such as 0.5,0.5,0.5") from error
    return values * 3 if len(values) == 1 else values


def train(
    config: Annotated[Optional[Path], typer.Option(help="A TOML file with these same keys; flags win.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Folder or ZIP, a folder per class (train/ and test/ inside, or split by the seed). Default: built-in digits.")] = None,
    run: Annotated[Optional[Path], typer.Option(help="An existing run: with --data, learn ONE more task; without, go on where it was killed.")] = None,
    name: Annotated[Optional[str], typer.Option(help="With --run and --data: the new task's name. Default: the folder's.")] = None,
    tasks: Annotated[Optional[int], typer.Option(help="Cut the classes into so many tasks.")] = None,
    base_classes: Annotated[Optional[int], typer.Option(help="Train the whole backbone on so many classes first, then freeze it.")] = None,
    test_fraction: Annotated[Optional[float], typer.Option(help="Share of each class kept for testing, where there is no test/ folder.")] = None,
    backbone: Annotated[Optional[str], typer.Option(help="A timm ViT with a fused qkv.")] = None,
    weights: Annotated[Optional[str], typer.Option(help="Its weights, a safetensors file. Default: timm's own download.")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Side of the model's input, in pixels.")] = None,
    mean: Annotated[Optional[str], typer.Option(help="Override the backbone's normalisation: R,G,B in 0..1.")] = None,
    std: Annotated[Optional[str], typer.Option(help="Override the backbone's normalisation: R,G,B in 0..1.")] = None,
    rank: Annotated[Optional[str], typer.Option(help="Rank of each task's direction, or a schedule (RR): 10,8@4,6@8 is 8 from task 4, 6 from task 8.")] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Epochs for each task.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Learning rate.")] = None,
    head_lr_factor: Annotated[Optional[float], typer.Option(help="The head learns at this share of the rate.")] = None,
    optimizer: Annotated[Optional[str], typer.Option(help="sgd (momentum 0.9), adam or adamw.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Pictures in a step.")] = None,
    magnitudes: Annotated[Optional[str], typer.Option(help="At a new task: carry the old ones over, or reset all (the authors' code).")] = None,
    head: Annotated[Optional[str], typer.Option(help="paper: a row is trained with its task; aligned: all rows are fitted again after each task.")] = None,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu or cuda.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder of the new run. Default: runs/<time>.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of class order, split and training.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Learn a stream of classes task by task, keeping no picture of an earlier task."""
    given = {
        flag: value
        for flag, value in locals().items()
        if value is not None and flag not in ("config", "run", "name", "out", "json")
    }
    from ..train import config as settings
    from ..train import trainer

    flags = given | {flag: _numbers(given[flag], flag) for flag in ("mean", "std") if flag in given}

    def report(progress: Run) -> None:
        if not json:
            typer.echo(accuracy_row(progress))

    if run is None:
        if name is not None:
            raise UsageError("--name names the task that --run RUN --data FOLDER adds")
        done = trainer.train(settings.resolve(config, flags), out, report)
    else:
        more = given | ({"config": config} if config else {}) | ({"out": out} if out else {})
        if extra := sorted(flag.replace("_", "-") for flag in more if flag != "data"):
            raise UsageError(f"--{', --'.join(extra)}: a run keeps the settings it was begun with; give only --data and --name")
        done = trainer.add_task(run, data, name, report) if data is not None else trainer.resume(run, report)
    result = {
        "run": str(done.path),
        "tasks": len(done.updates),
        "classes": list(done.states[-1].classes),
        "metrics": done.metrics[-1],
    }
    emit(result, json, lambda: _summary(done))


def accuracy_row(run: Run) -> str:
    """One line of the growing table: accuracy on every task so far, in percent."""
    entry = run.metrics[-1]
    cells = ["-" if c is None else f"{100 * c / n:5.1f}" if n else "no test" for c, n in zip(entry["correct"][-1], entry["totals"])]
    whole = f"all {100 * entry['accuracy'][-1]:5.1f} | " if "accuracy" in entry else ""
    return f"task {entry['task']:>3} {entry['name'][:16]:16} {len(entry['classes']):>4} classes {entry['seconds']:>7.1f} s | {whole}{' '.join(cells)}"


def _summary(run: Run) -> str:
    entry = run.metrics[-1]
    names = ("last", "average_anytime", "forgetting", "backward_transfer")
    scores = [[n.replace("_", " "), f"{100 * entry[n]:.2f} %"] for n in names if n in entry]
    return (table(["", "accuracy"], scores) + "\n" if scores else "") + f"run: {run.path}"
